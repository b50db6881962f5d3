"""One layer of a cache, as the attention of some rows sees it: what it adds is put among what the other rows keep.

Every layer of the cache holds every row, whichever rows run it, so that masks, lengths and windows are the library's
own.

Shapes: `R` rows, `r` of them run the layer, `H` key-value heads, `s` tokens that run, `T` tokens kept, `d` head size.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import Cache

from token_exits.keys_values import KeysValues


class SomeRows:
    """Stands in for the cache in a call of one layer for the rows [r]; the newest token of the others is known.

    Args:
        rows: places [r] of the rows that run.
        others: places of the other rows, and the keys and values [R - r, H, 1, d] of their newest token.
    """

    def __init__(self, cache: Cache, rows: torch.Tensor, others: tuple[torch.Tensor, KeysValues]) -> None:
        self._cache, self._rows, self._others = cache, rows, others

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int, *args: Any, **kwargs: Any) -> KeysValues:
        """Keep the rows' own [r, H, 1, d] with the others'; returns what is kept of the rows [r, H, T, d]."""
        places, (other_keys, other_values) = self._others
        kept = self._cache.update(
            self._among(keys, places, other_keys), self._among(values, places, other_values), layer, *args, **kwargs
        )
        return kept[0].index_select(0, self._rows), kept[1].index_select(0, self._rows)

    def _among(self, own: torch.Tensor, places: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        whole = own.new_empty(len(self._rows) + len(places), *own.shape[1:])
        return whole.index_copy_(0, self._rows, own).index_copy_(0, places, others.to(own.dtype))


class SomeTokens:
    """Stands in for the cache in a call of one layer for some rows with their newest token and older ones, for which
    there is nothing yet where they belong. Other rows get an empty slot.

    Args:
        rows: places [r] of the rows that run.
        slots: for each of their s tokens its place in the cache [r, s], the newest last.
    """

    def __init__(self, cache: Cache, rows: torch.Tensor, slots: torch.Tensor) -> None:
        self._cache, self._rows, self._slots = cache, rows, slots

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int, *args: Any, **kwargs: Any) -> KeysValues:
        """Keep the rows' tokens [r, H, s, d] at their slots; returns what is kept of the rows [r, H, T, d]."""
        add_empty_slot(self._cache, layer)
        kept: Any = self._cache.layers[layer]
        for whole, own in ((kept.keys, keys), (kept.values, values)):
            whole[self._rows[:, None], :, self._slots] = own.transpose(1, 2)
        return kept.keys.index_select(0, self._rows), kept.values.index_select(0, self._rows)


def add_empty_slot(cache: Cache, layer: int) -> None:
    """Give a layer of a cache, which holds something, room for one more token, of zeros."""
    kept: Any = cache.layers[layer]
    cache.update(torch.zeros_like(kept.keys[:, :, :1]), torch.zeros_like(kept.values[:, :, :1]), layer)
