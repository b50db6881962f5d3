"""KV strategies: keys and values of tokens that left before a layer.

Every layer of the cache holds every row, so masks, lengths and windows stay the library's own.

Shapes: `R` rows, `r` of them, `s` tokens of a row in a pass, the newest last, `T` tokens in the cache, `D` hidden size,
`H` key-value heads, `d` head size.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache, PreTrainedModel

from backbone.execution.live_changes import Forward
from backbone.execution.rows import cut, taken, with_rows
from backbone.families import decoder_layers
from backbone.plan import LayerPlan
from token_exits.kv_projection import KeysValues, project
from token_exits.token_step import TokenStep

MOST_DEFERRED = 8
"""A row with this many deferred tokens runs all layers at its next one."""


class KVStrategy:
    """Runs layers for the active rows, and fills the cache for the others."""

    def begin(self, step: TokenStep, cache: Cache) -> None:
        """A decode step begins."""

    def may_exit(self, step: TokenStep, confident: torch.Tensor) -> torch.Tensor:
        """Which of the active rows that are `confident` [r] may leave."""
        return confident

    def exit(self, step: TokenStep, depth: int, rows: torch.Tensor, states: torch.Tensor) -> None:
        """Some rows leave before layer `depth`, with their states among all [R, 1, D]."""

    def resume(self, step: TokenStep, depth: int) -> None:
        """The active rows go on to layer `depth`."""

    def end(self) -> None:
        """The last layer has run."""

    def run(
        self, step: TokenStep, index: int, forward: Forward, states: torch.Tensor, kwargs: dict[str, Any]
    ) -> torch.Tensor:
        """One layer for the active rows; the others keep their states [R, 1, D]."""
        raise NotImplementedError


class PropagatedKV(KVStrategy):
    """`propagate` and `share`: KV propagation by projection or by copy."""

    def __init__(self, model: PreTrainedModel, plan: LayerPlan, *, shares: bool) -> None:
        self._layers, self._shares = list(decoder_layers(model)), shares
        kinds = getattr(model.config, "layer_types", None) or ["full_attention"] * len(self._layers)
        self._source: dict[int, int | None] = {}
        last: dict[str, int] = {}
        for index in sorted(plan.attention):
            self._source[index] = last.get(kinds[index])
            last[kinds[index]] = index

    def first_shared(self) -> int:
        """The first layer from which on each has one of its kind before it."""
        return max(index for index, source in self._source.items() if source is None) + 1

    def keys_values(self, rows: torch.Tensor, index: int, states: torch.Tensor, kwargs: dict[str, Any]) -> KeysValues:
        """Keys and values [r, H, 1, d] of the newest token of `rows` in layer `index`.

        Args:
            states: with which they left, in their places among all [R, 1, D].
            kwargs: the layer's arguments.
        """
        if self._shares:
            source = kwargs["cache"].layers[self._source[index]]
            return source.keys[rows, :, -1:], source.values[rows, :, -1:]
        embeddings = kwargs["position_embeddings"]
        if len(rows) == len(states):
            return project(self._layers[index], states, embeddings)
        own = cut(embeddings, len(states), lambda _: rows)
        return project(self._layers[index], taken(states, rows), own)

    def run(
        self, step: TokenStep, index: int, forward: Forward, states: torch.Tensor, kwargs: dict[str, Any]
    ) -> torch.Tensor:
        if step.all_active:
            return forward(states, **kwargs)  # type: ignore[no-any-return]
        has_cache = index in self._source
        filled = self.keys_values(step.exited, index, states, kwargs) if has_cache else None
        if step.none_active:
            if filled is not None:
                kwargs["cache"].update(*filled, index)
            return states
        own = step.cut(kwargs)
        if filled is not None:
            own["cache"] = _RowCache(kwargs["cache"], step.active, step.exited, filled)
        return with_rows(states, step.active, forward(taken(states, step.active), **own))


class _RowCache:
    """The cache of one layer for the active rows [r], the others filled in.

    Args:
        active: places [r] of the rows that run.
        exited: places of the others.
        filled: keys and values [R - r, H, 1, d] of their newest token.
    """

    def __init__(self, cache: Cache, active: torch.Tensor, exited: torch.Tensor, filled: KeysValues) -> None:
        self._cache, self._active, self._exited, self._filled = cache, active, exited, filled

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int, *args: Any, **kwargs: Any) -> KeysValues:
        """Store [r, H, 1, d] with the others'; returns all of the active rows [r, H, T, d]."""
        merged_keys, merged_values = map(self._merged, (keys, values), self._filled)
        stored = self._cache.update(merged_keys, merged_values, layer, *args, **kwargs)
        return stored[0].index_select(0, self._active), stored[1].index_select(0, self._active)

    def _merged(self, own: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        whole = own.new_empty(len(self._active) + len(self._exited), *own.shape[1:])
        return whole.index_copy_(0, self._active, own).index_copy_(0, self._exited, others.to(own.dtype))


@dataclass(eq=False)
class _Token:
    """A token that has not been through all layers.

    Attributes:
        step: at which it was the newest.
        slot: its place in the cache.
        state: [D], before its next layer.
    """

    step: int
    slot: int
    state: torch.Tensor


class DeferredKV(KVStrategy):
    """`recompute`: deferred KV computation.

    A later token of the row takes deferred tokens through the layers.
    Keys and values are then those of the full model. Source: EE-LLM, Chen et al. 2023 (arXiv 2312.04916, section 3.3).
    """

    def __init__(self) -> None:
        self._deferred: dict[int, dict[int, list[_Token]]] = defaultdict(dict)  # by row and next layer
        self._resumed: dict[int, list[_Token]] = defaultdict(list)  # by row, oldest first
        self._embeddings: dict[int, dict[int, KeysValues]] = {}  # by step and layer, [R or 1, 1, d]
        self._slot = 0

    def begin(self, step: TokenStep, cache: Cache) -> None:
        self._slot = cache.get_seq_length()
        self._embeddings[step.step] = {}
        self._embeddings.pop(step.step - MOST_DEFERRED - 1, None)

    def may_exit(self, step: TokenStep, confident: torch.Tensor) -> torch.Tensor:
        counts = [sum(map(len, self._deferred[row].values())) + len(self._resumed[row]) for row in step.active.tolist()]
        return confident & (torch.tensor(counts, device=confident.device) < MOST_DEFERRED)

    def exit(self, step: TokenStep, depth: int, rows: torch.Tensor, states: torch.Tensor) -> None:
        for row in rows.tolist():
            newest = _Token(step.step, self._slot, states[row, 0])
            self._deferred[row].setdefault(depth, []).extend([*self._resumed.pop(row, []), newest])

    def resume(self, step: TokenStep, depth: int) -> None:
        for row in step.active.tolist():
            tokens = [*self._resumed[row], *self._deferred[row].pop(depth, [])]
            self._resumed[row] = sorted(tokens, key=lambda token: token.slot)

    def end(self) -> None:
        self._resumed.clear()

    def run(
        self, step: TokenStep, index: int, forward: Forward, states: torch.Tensor, kwargs: dict[str, Any]
    ) -> torch.Tensor:
        self._embeddings[step.step][index] = kwargs["position_embeddings"]
        if step.all_active and not any(self._resumed.values()):
            return forward(states, **kwargs)  # type: ignore[no-any-return]
        if step.none_active:
            _add_empty_slot(kwargs["cache"], index)
            return states
        rows, tokens = step.active, self._aligned(step, states)
        slots = torch.tensor([[token.slot for token in line] for line in tokens], device=rows.device)
        own = step.cut(kwargs)
        own["cache"] = _SlotCache(kwargs["cache"], rows, slots)
        own["position_embeddings"] = self._embeddings_of(tokens, rows, index)
        own["attention_mask"] = _mask_of(own.get("attention_mask"), slots, self._slot + 1)
        output = forward(torch.stack([torch.stack([token.state for token in line]) for line in tokens]), **own)
        for place, line in enumerate(tokens):
            for column, token in enumerate(line):
                token.state = output[place, column]
        return with_rows(states, rows, output[:, -1:])

    def _aligned(self, step: TokenStep, states: torch.Tensor) -> list[list[_Token]]:
        """The s tokens of each active row, padded at the front with harmless copies of the newest."""
        rows = step.active.tolist()
        most, lines = max(len(self._resumed[row]) for row in rows), []
        for row in rows:
            newest = _Token(step.step, self._slot, states[row, 0])
            lines.append([newest] * (most - len(self._resumed[row])) + [*self._resumed[row], newest])
        return lines

    def _embeddings_of(self, tokens: Sequence[Sequence[_Token]], rows: torch.Tensor, index: int) -> KeysValues:
        """Position embeddings [r, s, d] of tokens: cosines and sines."""

        def of_token(token: _Token, row: int, part: int) -> torch.Tensor:
            embedding = self._embeddings[token.step][index][part]
            return embedding[row if len(embedding) > 1 else 0, 0]

        lines = list(zip(rows.tolist(), tokens, strict=True))
        cosines, sines = (
            torch.stack([torch.stack([of_token(token, row, part) for token in line]) for row, line in lines])
            for part in (0, 1)
        )
        return cosines, sines


class _SlotCache:
    """The cache of one layer for rows with deferred tokens; others get a gap.

    Args:
        rows: places [r] of the rows that run.
        slots: the place in the cache of each of their s tokens [r, s], the newest last.
    """

    def __init__(self, cache: Cache, rows: torch.Tensor, slots: torch.Tensor) -> None:
        self._cache, self._rows, self._slots = cache, rows, slots

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int, *args: Any, **kwargs: Any) -> KeysValues:
        """Store [r, H, s, d] at the slots; returns all of these rows [r, H, T, d]."""
        _add_empty_slot(self._cache, layer)
        stored: Any = self._cache.layers[layer]
        for whole, own in ((stored.keys, keys), (stored.values, values)):
            whole[self._rows[:, None], :, self._slots] = own.transpose(1, 2)
        return stored.keys.index_select(0, self._rows), stored.values.index_select(0, self._rows)


def _add_empty_slot(cache: Cache, layer: int) -> None:
    """Append one token of zeros to a layer of a cache that is not empty."""
    stored: Any = cache.layers[layer]
    cache.update(torch.zeros_like(stored.keys[:, :, :1]), torch.zeros_like(stored.values[:, :, :1]), layer)


def _mask_of(newest: torch.Tensor | None, slots: torch.Tensor, length: int) -> torch.Tensor:
    """Causal mask [r, 1, s, T] of tokens at `slots` [r, s], from the newest token's."""
    is_before = torch.arange(length, device=slots.device) <= slots[:, None, :, None]
    if newest is None:
        return is_before
    if newest.dtype == torch.bool:
        return is_before & newest
    return newest.masked_fill(~is_before, torch.finfo(newest.dtype).min)
