"""A key-value cache that holds nothing for the attention blocks that a plan skips."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin, DummyLayer

from backbone.errors import InputError
from backbone.plan import LayerPlan


class CacheMismatchError(InputError):
    """A cache filled under one plan was passed to a model that runs another, or none."""


class SkippedLayer(DummyLayer):
    """The library's own placeholder, put where a plan skips attention; it knows the plan and the layer.

    Raises:
        CacheMismatchError: (from `update`) a model that runs this layer, such as one without a plan, got the cache.
    """

    def __init__(self, plan: LayerPlan | str, index: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.plan, self.index = plan, index

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if key_states is None and value_states is None:
            return None, None
        raise CacheMismatchError(
            f"this cache was filled under plan {self.plan}, which skips layer {self.index}, and now this layer runs; "
            "go on with the allocator or inside apply_plan(model, plan), or use a new cache"
        )


def drop_skipped_layers(cache: Cache, plan: LayerPlan) -> None:
    """Put a placeholder where `plan` skips attention, so that masks and lengths ignore those layers.

    Without it a skipped first layer is silently wrong: mask sizes and sequence lengths are read from the first layer
    of its kind, which would stay empty. Works on fresh caches; a cache already filled under `plan` passes unchanged.

    Raises:
        CacheMismatchError: the cache was filled under another plan.
    """
    if cache.layer_class_to_replicate is not None:
        cache.layers.extend(cache.layer_class_to_replicate() for _ in range(plan.n_layers - len(cache.layers)))
    for index, layer in enumerate(cache.layers):
        is_placeholder = isinstance(layer, DummyLayer)
        if _has_own_rows(layer):
            raise CacheMismatchError(
                f"this cache was filled under a plan for each row, and {plan} is one for all; use a new cache"
            )
        if index in plan.attention and is_placeholder:
            raise CacheMismatchError(
                f"this cache was filled without layer {index}, which plan {plan} runs; use a new cache"
            )
        if index not in plan.attention and not is_placeholder:
            if isinstance(layer, CacheLayerMixin) and layer.get_seq_length() > 0:
                raise CacheMismatchError(
                    f"this cache holds layer {index}, which plan {plan} skips; use a new one or the plan that filled it"
                )
            cache.layers[index] = SkippedLayer(plan, index)


Held = tuple[int, ...]
"""The rows of a batch that a layer of a cache holds, ascending."""


@lru_cache
def _of_some_rows(kind: type[CacheLayerMixin]) -> type[Any]:
    """A class of cache layers that hold some rows of the batch: what is asked of the whole cache, by the places of rows
    among all, is done with the rows that are here.

    Single inheritance, so that the class of an existing layer can be changed into it.
    """

    class OfSomeRows(kind):  # type: ignore[misc, valid-type]
        _held: Held
        _n_rows: int

        def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if len(key_states) != len(self._held):
                raise CacheMismatchError(
                    f"this cache was filled under a plan for each row: one of its layers holds {len(self._held)} of "
                    f"{self._n_rows} rows, and got {len(key_states)}; go on with the same plans, or with a new cache"
                )
            return super().update(key_states, value_states, *args, **kwargs)

        def reorder_cache(self, beam_idx: torch.Tensor) -> None:
            super().reorder_cache(self._places()[beam_idx.cpu()[list(self._held)]])

        def batch_select_indices(self, indices: torch.Tensor) -> None:
            places = self._places()[torch.arange(self._n_rows)[indices.cpu()]]
            super().batch_select_indices(places[places >= 0])
            self._held, self._n_rows = tuple((places >= 0).nonzero()[:, 0].tolist()), len(places)

        def batch_repeat_interleave(self, repeats: int) -> None:
            super().batch_repeat_interleave(repeats)
            self._held = tuple(row * repeats + copy for row in self._held for copy in range(repeats))
            self._n_rows *= repeats

        def _places(self) -> torch.Tensor:
            """For each row of the batch its place in this layer, -1 for those that it does not hold."""
            places = torch.full((self._n_rows,), -1)
            places[list(self._held)] = torch.arange(len(self._held))
            return places

    return OfSomeRows


def keep_rows(cache: Cache, rows: Sequence[Held], n_rows: int) -> None:
    """Make each of the L layers of a fresh cache hold the keys and values of some rows; a cache that was filled like
    this before passes unchanged.

    Args:
        rows: of each layer.
        n_rows: R.

    Raises:
        CacheMismatchError: the cache was filled with other rows.
    """
    if cache.layer_class_to_replicate is not None:
        cache.layers.extend(cache.layer_class_to_replicate() for _ in range(len(rows) - len(cache.layers)))
    for index, (layer, wanted) in enumerate(zip(cache.layers, rows, strict=True)):
        held = _rows_held(layer, n_rows)
        if held is None:
            if len(wanted) < n_rows:
                _hold_rows(cache, index, wanted, n_rows)
        elif held != wanted:
            raise CacheMismatchError(
                f"this cache was filled under other plans: layer {index} holds the rows {list(held)}, wanted "
                f"{list(wanted)}; use a new cache or the plans that filled it"
            )


def _hold_rows(cache: Cache, index: int, rows: Held, n_rows: int) -> None:
    """From now on an empty layer holds fewer rows than all."""
    layer: Any = cache.layers[index]
    if not rows:
        cache.layers[index] = SkippedLayer("of each row", index)
        return
    if not isinstance(layer, CacheLayerMixin):
        raise CacheMismatchError(f"the {type(layer).__name__} of this cache cannot hold some rows of a batch")
    layer.__class__ = _of_some_rows(type(layer))
    layer._held, layer._n_rows = rows, n_rows  # type: ignore[attr-defined]


def _rows_held(layer: Any, n_rows: int) -> Held | None:
    """The rows that a layer of a cache holds; None if it holds nothing yet."""
    if isinstance(layer, DummyLayer):
        return ()
    if _has_own_rows(layer):
        return layer._held  # type: ignore[no-any-return]
    return tuple(range(n_rows)) if layer.get_seq_length() else None


def _has_own_rows(layer: object) -> bool:
    return hasattr(layer, "_held")


_FILLED_UNDER = "_layerbudget_filled_under"


def remember_plans(cache: Cache, plans: tuple[LayerPlan, ...], healing: str) -> None:
    """Note on a cache what fills it, for whoever gets the cache later; copies of the cache keep the note.

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
