"""A key-value cache that holds nothing for the attention blocks that a plan skips."""

from __future__ import annotations

from transformers import Cache
from transformers.cache_utils import CacheLayerMixin, DummyLayer

from backbone.errors import InputError
from backbone.plan import LayerPlan


class CacheMismatchError(InputError):
    """A cache filled under one plan was passed to a model that runs another."""


def drop_skipped_layers(cache: Cache, plan: LayerPlan) -> None:
    """Put the library's own placeholder where `plan` skips attention, so that masks and lengths ignore those layers.

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
            cache.layers[index] = DummyLayer()  # type: ignore[no-untyped-call]


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
