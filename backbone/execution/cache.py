"""A key-value cache that holds nothing for the attention blocks that a plan skips."""

from __future__ import annotations

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

    def __init__(self, plan: LayerPlan, index: int) -> None:
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


_FILLED_UNDER = "_layerbudget_filled_under"


def remember_plan(cache: Cache, plan: LayerPlan, stand_ins: str) -> None:
    """Note on a cache what fills it, for whoever gets the cache later; copies of the cache keep the note.

    Args:
        stand_ins: digest of the stand-ins that the plan runs with, empty for none.
    """
    setattr(cache, _FILLED_UNDER, (plan, stand_ins))


def remembered_plan(cache: Cache) -> tuple[LayerPlan, str] | None:
    """The plan that a cache was filled under and the digest of its stand-ins; None if no plan was applied."""
    return getattr(cache, _FILLED_UNDER, None)


def cache_bytes(cache: Cache) -> int:
    """Bytes of the keys and values that a cache holds; a placeholder holds none."""
    return sum(layer_bytes(layer) for layer in cache.layers)


def layer_bytes(layer: object) -> int:
    """Bytes of the keys and values of one layer of a cache."""
    tensors = (getattr(layer, "keys", None), getattr(layer, "values", None))
    return sum(int(tensor.numel() * tensor.element_size()) for tensor in tensors if tensor is not None)
