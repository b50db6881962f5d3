"""Whose run a folder is, and which of its stages are done: those whose inputs and results are the recorded ones.

A stage's key is a hash of the prompts, the model's source, the configuration that the stage reads, and the results of
all stages before it. So a stage that is done again with another result makes later ones undone, one with the same
result does not.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path, PurePath
from typing import Any

from backbone.files import UNFINISHED, write_atomically
from backbone.model_source import PACKAGE_PREFIX
from pipelines.config import Config, ConfigError
from pipelines.run.stage_list import BY_NAME, Stage, all_before

FORMAT_VERSION = 6
"""Raised when a change of code makes the stages' earlier files wrong."""

LOCK = ".lock"


class RunState:
    """`run.json` in the run folder. Reads only, until `begin` or `record`.

    Raises:
        ConfigError: the folder is another run's, or holds somebody's files but no run.
    """

    def __init__(self, config: Config) -> None:
        self._config, self._path = config, config.folder / "run.json"
        self._data: dict[str, Any] = {"config": _owner(config), "model": config.model.source, "stages": {}}
        self._hashes: dict[str, str | None] = {}
        if self._path.exists():
            self._data = self._read()
            self._check_owner()
        else:
            _check_unused(config)

    def begin(self) -> None:
        """Make the folder this run's, before anything else is written there."""
        if not self._path.exists():
            self._write()

    def key(self, stage: Stage) -> str:
        """Hash of everything that the stage's result depends on, as far as the stages before it are done."""
        from pipelines.run.workspace import Workspace  # torch, which whose folder it is can be seen without

        values = self._config.model_dump(mode="json")
        given = self._config.adapt.given if stage.name == "adapt" else None
        parts = {
            "format": FORMAT_VERSION,
            "stage": stage.name,
            "model": [_source_identity(self._config.model.source), self._config.model.dtype, self._config.model.device],
            "prompts": Workspace.of(self._config).prompts_hash,
            "splits": [values["data"][name] for name in ("shares", "seed")],
            "reads": {key: _value(values, key) for key in stage.reads},
            "before": [self._result(earlier) for earlier in all_before(stage)],
            **({} if given is None else {"given": self._hash(str(Path(given).absolute()))}),
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    def is_done(self, stage: Stage) -> bool:
        """Whether the stage and all before it are done, and their files the ones that they left.

        Raises:
            ConfigError: labels that were recorded have changed.
        """
        return all(self._is_done(earlier) for earlier in [*all_before(stage), stage])

    def _is_done(self, stage: Stage) -> bool:
        entry = self._data["stages"].get(stage.name)
        if entry is None or entry["key"] != self.key(stage):
            return False
        found = {name: self._hash(name) for name in stage.files}
        if stage.name == "label" and None not in found.values() and found != entry["files"]:
            raise ConfigError(
                f"{self._config.folder / 'labels.db'} no longer holds the labels that this run made; "
                "delete it, and they are made again"
            )
        return bool(found == entry["files"])

    def _result(self, stage: Stage) -> dict[str, str] | None:
        entry = self._data["stages"].get(stage.name)
        return entry and {name: known for name, known in entry["files"].items() if name not in stage.notes}

    def record(self, stage: Stage, seconds: float) -> None:
        """Note that the stage is done, with what it left.

        Raises:
            ConfigError: something of it is missing.
        """
        self._hashes.clear()
        files = {name: self._hash(name) for name in stage.files}
        if missing := [name for name, found in files.items() if found is None]:
            raise ConfigError(f"the stage {stage.name!r} has ended, but {missing[0]} is missing or not complete")
        self._data["stages"][stage.name] = {"key": self.key(stage), "files": files, "seconds": round(seconds, 1)}
        self._write()

    def seconds(self) -> dict[str, float]:
        """Computing time of each finished stage, of the run that finished it."""
        return {name: entry["seconds"] for name, entry in self._data["stages"].items()}

    def _hash(self, name: str) -> str | None:
        from pipelines.run.workspace import Workspace

        if name not in self._hashes:
            labels = name == "labels.db"
            path = self._config.folder / name
            self._hashes[name] = Workspace.of(self._config).labels_digest() if labels else content_hash(path)
        return self._hashes[name]

    def _write(self) -> None:
        write_atomically(self._path, json.dumps(self._data, indent=2) + "\n")

    def _read(self) -> dict[str, Any]:
        try:
            data: dict[str, Any] = json.loads(self._path.read_text(encoding="utf-8"))
            for entry in data["stages"].values():
                _ = entry["key"], dict(entry["files"]), round(entry["seconds"], 1)
            return {name: data[name] for name in self._data}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise ConfigError(
                f"{self._path} is damaged; put {json.dumps({**self._data, 'stages': {}})} into it, "
                "and the stages are done again with the labels kept"
            ) from None

    def _check_owner(self) -> None:
        for what, mine in (("config", _owner(self._config)), ("model", self._config.model.source)):
            if (theirs := self._data[what]) != mine:
                raise ConfigError(
                    f"{self._config.folder} belongs to the {what} {theirs}, not {mine}; "
                    f"give this run a name of its own, for example --set name={self._config.name}-2"
                )


def stage_key(config: Config, name: str) -> str:
    """See `RunState.key`."""
    return RunState(config).key(BY_NAME[name])


def _owner(config: Config) -> str:
    """The configuration's file as seen from the run's folder: the same when the whole project is moved or copied.

    Raises:
        ConfigError: it lies in the run's folder, where its resolved form would take its place.
    """
    folder = config.folder.resolve()
    if not config.file:
        return ""
    if folder in Path(config.file).parents:
        raise ConfigError(
            f"the configuration {config.file} lies in the folder of its own run, {config.folder}; "
            "keep it elsewhere, or give the run another name"
        )
    return Path(os.path.relpath(config.file, folder)).as_posix()


def _check_unused(config: Config) -> None:
    """A folder without a run may be used if there is nothing in it."""
    if config.folder.exists() and not config.folder.is_dir():
        raise ConfigError(f"{config.folder} should be a run's folder, but is a file; choose another name")
    found = sorted(path.name for path in config.folder.iterdir()) if config.folder.is_dir() else []
    if foreign := [name for name in found if not name.startswith(LOCK) and not name.endswith(UNFINISHED)]:
        raise ConfigError(
            f"{config.folder} holds {foreign[0]!r}, but no run (there is no run.json); choose another name, "
            f"for example --set name={config.name}-2"
        )


def check_own(folder: Path, is_own: Callable[[PurePath], bool]) -> None:
    """Raises ConfigError where somebody keeps a file in a folder that a stage is about to replace.

    Args:
        is_own: whether a file, by its path in the folder, is one that the stage writes.
    """
    for path in sorted(folder.rglob("*")):
        if not path.is_dir() and not is_own(path.relative_to(folder)):
            raise ConfigError(f"{path} lies in a folder that a stage replaces, and is none of its files; move it away")


def _value(values: dict[str, Any], key: str) -> Any:
    for part in key.split("."):
        values = values[part]
    return values


def _source_identity(source: str) -> list[Any]:
    """The source, with names, sizes and times of its files where they are local."""
    path = Path(source).expanduser()
    if source.startswith(PACKAGE_PREFIX) or not path.exists():
        return [source]
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return [source, *([file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files if file.is_file())]


def content_hash(path: Path) -> str | None:
    """SHA-256 of a file or of a folder's files; None where there is nothing."""
    if not path.exists():
        return None
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            digest.update(file.relative_to(path.parent).as_posix().encode() + file.read_bytes())
    return digest.hexdigest()
