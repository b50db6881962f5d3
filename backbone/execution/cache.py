"""A key-value cache whose layers hold only the rows that run them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin, DummyLayer

from backbone.errors import PlanError
from backbone.plan import LayerPlan

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
