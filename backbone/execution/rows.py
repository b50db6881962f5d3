"""The rows of a pass, sets of them, and how a tensor of rows is cut and joined.

Shapes: `B` prompts, each in `c` neighbouring rows, `R = B * c` rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from backbone.errors import PlanError

Prompts = tuple[int, ...]
"""Some of the B prompts, ascending."""

STATES = ("hidden_states", "residual")
"""What differs from layer to layer; where it has no name it is the first or second argument."""

Places = slice | torch.Tensor
"""Rows of a tensor: a slice where they are neighbours, which is cut out without a copy."""


class RowSets:
    """Which rows a pass has, and which of them its states hold at the moment.

    Attributes:
        current: the prompts whose rows the states hold.
    """

    def __init__(self, n_prompts: int, n_heads: int) -> None:
        self.current: Prompts = tuple(range(n_prompts))
        self._every, self._copies, self._heads = self.current, 1, n_heads
        self._shared: dict[tuple[Prompts, Prompts], Prompts] = {}
        self._places: dict[tuple[Prompts, Prompts, int, torch.device], Places] = {}
        self._cuts: dict[tuple[object, ...], tuple[object, Any]] = {}

    def begin(self, n_rows: int) -> None:
        """A pass over R rows begins. Raises PlanError if R is no multiple of B."""
        copies, rest = divmod(n_rows, len(self._every))
        if rest or not copies:
            raise PlanError(
                f"this pass has {n_rows} rows, but plans were given for {len(self._every)} prompts; give a plan for "
                "each row, or for each prompt whose rows (beams, samples) are neighbours"
            )
        self._copies, self.current = copies, self._every
        self._cuts.clear()

    @property
    def n_rows(self) -> int:
        """Rows that the states hold."""
        return len(self.current) * self._copies

    def both(self, wanted: Prompts) -> Prompts:
        """The current prompts among `wanted`; the current ones themselves, not a copy, if all are."""
        key = (self.current, wanted)
        if key not in self._shared:
            kept = tuple(prompt for prompt in self.current if prompt in wanted)
            self._shared[key] = self.current if kept == self.current else kept
        return self._shared[key]

    def rows(self, prompts: Prompts) -> tuple[int, ...]:
        """The places of the prompts' rows in the batch as it was given."""
        return tuple(prompt * self._copies + copy for prompt in prompts for copy in range(self._copies))

    def places(self, prompts: Prompts, device: torch.device) -> Places:
        """The places of the prompts' rows among those that the states hold."""
        key = (prompts, self.current, self._copies, device)
        if key not in self._places:
            place_of = {prompt: place for place, prompt in enumerate(self.current)}
            places = [place_of[prompt] * self._copies + copy for prompt in prompts for copy in range(self._copies)]
            span = slice(places[0], places[-1] + 1) if places else slice(0, 0)
            are_neighbours = len(places) == span.stop - span.start
            self._places[key] = span if are_neighbours else torch.tensor(places, device=device)
        return self._places[key]

    def index(self, prompts: Prompts, device: torch.device) -> torch.Tensor:
        """`places` as a tensor."""
        found = self.places(prompts, device)
        return found if isinstance(found, torch.Tensor) else torch.arange(found.start, found.stop, device=device)

    def cut_arguments(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], inside: Prompts
    ) -> tuple[list[Any], dict[str, Any]]:
        """A module's arguments with each tensor that holds the current rows cut to some of them.

        Masks, position embeddings and the like come to every layer of a pass, and are cut once.
        """
        shared = [value for name, value in kwargs.items() if name not in STATES]
        key = (inside, self.current, *kwargs, *map(id, args[2:]), *map(id, shared))
        if key not in self._cuts:  # with the arguments themselves, so that their ids stay their own
            rest = {name: self.cut(value, inside) for name, value in kwargs.items() if name not in STATES}
            self._cuts[key] = ((args[2:], shared), ([self.cut(value, inside) for value in args[2:]], rest))
        others, rest = self._cuts[key][1]
        states = {name: self.cut(kwargs[name], inside) for name in STATES if name in kwargs}
        return [*(self.cut(value, inside) for value in args[:2]), *others], {**rest, **states}

    def cut(self, value: Any, inside: Prompts) -> Any:
        """A value with each tensor in it that holds the current rows cut to some of them."""
        if isinstance(value, (tuple, list)):
            return type(value)(self.cut(item, inside) for item in value)
        n_rows = self.n_rows
        if not isinstance(value, torch.Tensor) or value.dim() < 2 or len(value) not in (n_rows, n_rows * self._heads):
            return value
        places = self.places(inside, value.device)
        if len(value) == n_rows:
            return taken(value, places)
        by_row = value.reshape(n_rows, -1, *value.shape[1:])  # some masks have rows and heads in one dimension
        return taken(by_row, places).flatten(0, 1)


def taken(tensor: torch.Tensor, places: Places) -> torch.Tensor:
    """Some rows of a tensor [R, ...]; a view where they are neighbours."""
    return tensor[places] if isinstance(places, slice) else tensor.index_select(0, places)


def with_rows(tensor: torch.Tensor, places: Places, rows: torch.Tensor) -> torch.Tensor:
    """A copy of a tensor [R, ...] with other rows [r, ...] at some places."""
    if isinstance(places, torch.Tensor):
        return tensor.index_copy(0, places, rows)
    parts = (tensor[: places.start], rows, tensor[places.stop :])
    return torch.cat([part for part in parts if len(part)])
