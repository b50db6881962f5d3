"""The rows of a pass: sets of them, tensors cut to some, and a key-value cache whose layers hold those that run them.

Shapes: `B` prompts, each in `c` neighbouring rows, `R = B * c` rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin, DummyLayer

from backbone.errors import PlanError
from backbone.plan import LayerPlan

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
        return cut(value, self.n_rows, lambda device: self.places(inside, device), self._heads)


def cut(value: Any, n_rows: int, places: Callable[[torch.device], Places], n_heads: int = 1) -> Any:
    """A value with each tensor in it that holds R rows, or R * heads, cut to some places; any other as it is."""
    if isinstance(value, (tuple, list)):
        make = getattr(value, "_make", type(value))  # a named tuple takes its items one by one
        return make(cut(item, n_rows, places, n_heads) for item in value)
    if not isinstance(value, torch.Tensor) or value.dim() < 2 or len(value) not in (n_rows, n_rows * n_heads):
        return value
    if len(value) == n_rows:
        return taken(value, places(value.device))
    by_row = value.reshape(n_rows, -1, *value.shape[1:])  # some masks have rows and heads in one dimension
    return taken(by_row, places(value.device)).flatten(0, 1)


def taken(tensor: torch.Tensor, places: Places) -> torch.Tensor:
    """Some rows of a tensor [R, ...]; a view where they are neighbours."""
    return tensor[places] if isinstance(places, slice) else tensor.index_select(0, places)


def with_rows(tensor: torch.Tensor, places: Places, rows: torch.Tensor) -> torch.Tensor:
    """A copy of a tensor [R, ...] with other rows [r, ...] at some places."""
    if isinstance(places, torch.Tensor):
        return tensor.index_copy(0, places, rows)
    parts = (tensor[: places.start], rows, tensor[places.stop :])
    return torch.cat([part for part in parts if len(part)])


Rows = tuple[int, ...] | None
"""The rows of a batch that a layer of a cache holds, ascending; None for all."""


class SkippedLayer(DummyLayer):
    """The library's placeholder, put where no row runs attention. `update` raises PlanError if the layer does run."""

    def __init__(self, plan: str, index: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.plan, self.index = plan, index

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if key_states is None and value_states is None:
            return None, None
        raise PlanError(
            f"this cache was filled under plan {self.plan}, which skips layer {self.index}, and now this layer runs; "
            "go on with the allocator or inside apply_plan(model, plan), or use a new cache"
        )


class _SomeRows(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """Makes a layer of a cache hold some rows: calls by the places of rows in the batch act on those held."""

    rows: tuple[int, ...]
    n_rows: int

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if len(key_states) != len(self.rows):
            raise PlanError(
                f"this cache was filled under a plan for each row: one of its layers holds {len(self.rows)} of "
                f"{self.n_rows} rows, and got {len(key_states)}; go on with the same plans, or with a new cache"
            )
        return super().update(key_states, value_states, *args, **kwargs)  # type: ignore[safe-super]

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        super().reorder_cache(self._places()[beam_idx.cpu()[list(self.rows)]])  # type: ignore[arg-type]

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        places = self._places()[torch.arange(self.n_rows)[indices.cpu()]]
        super().batch_select_indices(places[places >= 0])  # type: ignore[misc]
        self.rows, self.n_rows = tuple((places >= 0).nonzero()[:, 0].tolist()), len(places)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        self.rows = tuple(row * repeats + copy for row in self.rows for copy in range(repeats))
        self.n_rows *= repeats

    def _places(self) -> torch.Tensor:
        """For each row of the batch its place in this layer, -1 for rows not held."""
        places = torch.full((self.n_rows,), -1)
        places[list(self.rows)] = torch.arange(len(self.rows))
        return places


@lru_cache
def _of_some_rows(kind: type[CacheLayerMixin]) -> type[Any]:
    return type(f"{kind.__name__}OfRows", (_SomeRows, kind), {})


def hold_rows(cache: Cache, wanted: Sequence[Rows], n_rows: int, plan: str) -> None:
    """Make each of the L layers of a fresh cache hold some rows; a cache filled like this before passes unchanged.

    Without it a skipped first layer is silently wrong: mask sizes and sequence lengths are read from the first layer
    of its kind, which would stay empty. Raises PlanError if the cache was filled under other plans.

    Args:
        wanted: the rows of each layer.
        n_rows: of the batch.
        plan: the name of the plan that fills the cache, for messages.
    """
    if cache.layer_class_to_replicate is not None:
        cache.layers.extend(cache.layer_class_to_replicate() for _ in range(len(wanted) - len(cache.layers)))
    for index, (layer, rows) in enumerate(zip(cache.layers, wanted, strict=False)):
        if (held := _rows_held(layer)) == rows:
            continue
        if held is not None or (isinstance(layer, CacheLayerMixin) and layer.get_seq_length() > 0):
            raise PlanError(
                f"this cache was filled under other plans: layer {index} holds {_shown(held)}, wanted are "
                f"{_shown(rows)}; use a new cache or the plans that filled it"
            )
        cache.layers[index] = _holding(layer, rows, n_rows) if rows else SkippedLayer(plan, index)


def _rows_held(layer: Any) -> Rows:
    if isinstance(layer, DummyLayer):
        return ()
    return layer.rows if isinstance(layer, _SomeRows) and len(layer.rows) < layer.n_rows else None


def _holding(layer: Any, rows: tuple[int, ...], n_rows: int) -> Any:
    """An empty layer like the given one, for fewer rows than all."""
    if not isinstance(layer, CacheLayerMixin):
        raise PlanError(f"the {type(layer).__name__} of this cache cannot hold some rows of a batch; use a new cache")
    kind = _of_some_rows(type(layer))
    found: Any = object.__new__(kind)
    found.__dict__.update(layer.__dict__, rows=rows, n_rows=n_rows)
    return found


def _shown(rows: Rows) -> str:
    return "all rows" if rows is None else f"the rows {list(rows)}" if rows else "no rows"


_FILLED_UNDER = "_layerbudget_filled_under"


def remember_plans(cache: Cache, plans: tuple[LayerPlan, ...], healing: str) -> None:
    """Note on a cache, and so on its copies, what fills it.

    Args:
        plans: one for all rows, or one for each prompt.
        healing: digest of the healing parts that shortened plans run with, empty for none.
    """
    setattr(cache, _FILLED_UNDER, (plans, healing))


def remembered_plans(cache: Cache) -> tuple[tuple[LayerPlan, ...], str] | None:
    """The plans that a cache was filled under and the digest of their healing parts; None if no plan was applied."""
    return getattr(cache, _FILLED_UNDER, None)


def cache_bytes(cache: Cache) -> int:
    """Bytes of the keys and values that a cache holds; a placeholder holds none."""
    return sum(layer_bytes(layer) for layer in cache.layers)


def layer_bytes(layer: object) -> int:
    """Bytes of the keys and values of one layer of a cache."""
    tensors = (getattr(layer, "keys", None), getattr(layer, "values", None))
    return sum(int(tensor.numel() * tensor.element_size()) for tensor in tensors if tensor is not None)
