"""Registries of named objects: our own entries, and those that installed packages add."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from functools import cached_property
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from typing import TypeVar

from backbone.errors import InputError

T = TypeVar("T")


class Registry(Mapping[str, T]):
    """Name -> object. Names are known without importing anything; an object is imported when first asked for.

    Another package adds a name with one line of its pyproject.toml, under
    `[project.entry-points."layerbudget.controllers"]`, such as `knn = "my_package:KNNController"`.

    Args:
        kind: what the entries are, in the plural, such as `controllers`; the entry points' group is named after it.
        ours: name -> `module:attribute`.
    """

    def __init__(self, kind: str, ours: Mapping[str, str]) -> None:
        self.group = f"layerbudget.{kind}"
        self._kind, self._ours = kind, {name: EntryPoint(name, place, self.group) for name, place in ours.items()}
        self._loaded: dict[str, T] = {}

    @cached_property
    def _entries(self) -> dict[str, EntryPoint]:
        entries = dict(self._ours)
        for entry in entry_points(group=self.group):
            if entry.name in entries and entries[entry.name].value != entry.value:
                raise InputError(
                    f"{entry.value} and {entries[entry.name].value} are both registered as {entry.name!r} under "
                    f"{self.group}; rename one, or uninstall its package"
                )
            entries[entry.name] = entry
        return entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __getitem__(self, name: str) -> T:
        """Raises InputError for an unknown name, or an object that cannot be imported."""
        if name not in self._loaded:
            self._loaded[name] = self._import(self._entries[self.checked(name)])
        return self._loaded[name]

    def checked(self, name: str) -> str:
        """The name; raises InputError unless it is known. Imports nothing."""
        if name not in self:
            nearest = get_close_matches(name, self, n=1)
            hint = f"; did you mean {nearest[0]!r}? Known are" if nearest else ", known are"
            raise InputError(f"{name!r:.80} is not among the {self._kind}{hint} {', '.join(self)}")
        return name

    def check_there(self, name: str) -> None:
        """Raises InputError unless the name is known and its object there; our own are looked for, not imported."""
        if self.checked(name) not in self._ours:
            _ = self[name]
        elif find_spec(self._ours[name].module) is None:
            raise InputError(f"{self._ours[name].value}, which is {name!r} of the {self._kind}, is not there")

    def _import(self, entry: EntryPoint) -> T:
        try:
            found: T = getattr(import_module(entry.module), entry.attr)
        except (Exception, SystemExit) as error:  # somebody's own code, which may do anything
            raise InputError(
                f"cannot import {entry.value}, registered as {entry.name!r} under {self.group}: "
                f"{type(error).__name__}: {error}"
            ) from None
        return found
