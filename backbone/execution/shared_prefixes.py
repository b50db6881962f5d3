"""Run the common beginning of many token sequences once, and copy its KV cache for each of them.

A batch is left-padded as always, and its first columns come from the cache. A row that is n tokens shorter than the
longest computes the last n tokens of the common beginning again: no row then has padding in its middle. So positions,
masks and sliding windows are those of the plain batch.

Shapes: `B` sequences, `S` tokens of the longest, `C` columns that come from the cache, `P` tokens of a beginning, `D`
hidden size.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from backbone.execution.apply_plan import apply_plan
from backbone.execution.live_changes import captured
from backbone.execution.prompt_prefix import Prefix, run_prefix
from backbone.families import decoder_layers, decoder_of
from backbone.left_padding import padded_inputs
from backbone.plan import LayerPlan

SHORTEST, FEWEST = 32, 3
"""Least length in tokens of a shared beginning, and least number of sequences that share it, for sharing to pay."""
CHARACTERS_PER_TOKEN, NEIGHBOURS = 4, 4096
"""Characters of usual text for one token; largest group, as the time to find groups grows with it."""


def shared_lengths(rows: Sequence[Sequence[Any]], shortest: int = SHORTEST) -> list[int]:
    """Length of the beginning that each sequence shares with its group; 0 for a sequence of no group.

    The groups are those that save most computation.

    Args:
        rows: token ids, or texts.
        shortest: least length of a beginning, in items of a row.
    """
    order = sorted(range(len(rows)), key=lambda number: tuple(rows[number]))
    lengths = [0] * len(rows)
    saved, starts, shared = np.zeros(len(rows) + 1), [0] * (len(rows) + 1), [0] * (len(rows) + 1)
    common = np.zeros(len(rows), dtype=np.int64)  # items common to the sequences from each place to the newest
    for end in range(1, len(rows) + 1):
        first, row = max(0, end - NEIGHBOURS), rows[order[end - 1]]
        before = rows[order[end - 2]] if end > 1 else ()
        common[first : end - 1] = np.minimum(common[first : end - 1], _common(before, row))
        common[end - 1] = len(row)
        others = np.arange(end - 1 - first, -1, -1)
        gains = np.where((common[first:end] >= shortest) & (others + 1 >= FEWEST), others * common[first:end], 0)
        best = int((saved[first:end] + gains).argmax())
        saved[end], starts[end] = saved[first + best] + gains[best], first + best
        shared[end] = int(common[first + best]) if gains[best] else 0
    end = len(rows)
    while end:
        for place in range(starts[end], end):
            lengths[order[place]] = shared[end]
        end = starts[end]
    return lengths


def _common(one: Sequence[Any], other: Sequence[Any]) -> int:
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))


def groups_of(rows: Sequence[Sequence[Any]], lengths: Sequence[int]) -> list[list[int]]:
    """Group the sequences whose first `lengths` items are the same; longest first, in and among groups."""
    groups: dict[Any, list[int]] = defaultdict(list)
    for number in sorted(range(len(rows)), key=lambda number: -len(rows[number])):
        groups[tuple(rows[number][: lengths[number]])].append(number)
    return list(groups.values())


def alike(texts: Sequence[str]) -> list[list[int]]:
    """Group texts by their common beginnings, without a tokenizer; longest first, in and among groups."""
    return groups_of(texts, shared_lengths(texts, SHORTEST * CHARACTERS_PER_TOKEN))


def can_share(model: PreTrainedModel) -> bool:
    """Whether a cache holds only keys and values, and these do not depend on the tokens that follow."""
    config: Any = decoder_of(model).config
    kinds = {type(layer) for layer in DynamicCache(config=config).layers}
    text = repr(config.to_dict())
    stretched = "longrope" in text or "'dynamic'" in text  # positions are scaled by the whole length
    return bool(kinds) and kinds <= {DynamicLayer, DynamicSlidingWindowLayer} and not stretched


@dataclass(frozen=True, slots=True, eq=False)
class Begun:
    """A left-padded batch whose first C columns come from a common beginning.

    Attributes:
        input_ids, mask: token ids and attention mask [B, S].
        columns: C, 0 where nothing is shared.
        cache: keys and values of the first C columns.
        states: states of the first C columns [B, C, D], by depth.
        positions: `position_ids` [B, S] where the decoder takes them.
    """

    input_ids: torch.Tensor
    mask: torch.Tensor
    columns: int
    cache: DynamicCache
    states: Mapping[int, torch.Tensor]
    positions: Mapping[str, torch.Tensor]

    @property
    def inputs(self) -> dict[str, Any]:
        """Arguments of the decoder for the pass over the columns after the first C."""
        ids = self.input_ids[:, self.columns :]
        positions = {name: value[:, self.columns :] for name, value in self.positions.items()}
        return {"input_ids": ids, "attention_mask": self.mask, "cache": self.cache, "use_cache": True, **positions}

    def whole(self, states: Mapping[int, torch.Tensor]) -> dict[int, torch.Tensor]:
        """States of all columns [B, S, D], given those after the first C [B, S - C, D]."""
        return {d: torch.cat([self.states[d], new], 1) if self.columns else new for d, new in states.items()}


class Beginning:
    """A common beginning of sequences, run once through the first `depth` layers without healing.

    Args:
        tokens: token ids of the beginning [P]; empty where nothing is shared.
        kept: depths whose states are kept.
    """

    def __init__(
        self, model: PreTrainedModel, tokens: Sequence[int] = (), depth: int = 1, kept: Collection[int] = ()
    ) -> None:
        self._model, self.tokens, self._prefix = model, list(tokens), Prefix(())
        self._kept = sorted(kept)
        if tokens:
            inputs = padded_inputs(model, [self.tokens])
            found = run_prefix(model, depth=depth, keep_cache=True, **inputs)
            self._prefix = Prefix(tuple(found.states[d] for d in self._kept), found.keys_values)

    def batch(self, rows: Sequence[Sequence[int]]) -> Begun:
        """Make a batch of sequences with this beginning; at least one token of each is left to compute."""
        found = padded_inputs(self._model, rows)
        ids, mask = found.pop("input_ids"), found.pop("attention_mask")
        config: Any = decoder_of(self._model).config
        cache, width = DynamicCache(config=config), ids.shape[1]
        columns = width - max(len(row) - min(len(self.tokens), len(row) - 1) for row in rows)
        if columns < 1:
            return Begun(ids, mask, 0, cache, {}, found)
        padding = torch.tensor([[width - len(row)] for row in rows])
        places = (torch.arange(columns) - padding).clamp(min=0).to(ids.device)  # padding is masked: any place will do
        for index, pair in enumerate(self._prefix.keys_values):
            keys, values = (tensor[0].transpose(0, 1)[places.to(tensor.device)].transpose(1, 2) for tensor in pair)
            cache.update(keys, values, index)
        states = zip(self._kept, (state[0][places.to(state.device)] for state in self._prefix.states), strict=True)
        return Begun(ids, mask, columns, cache, dict(states), found)

    def states(self, rows: Sequence[Sequence[int]], depth: int, depths: Collection[int]) -> dict[int, torch.Tensor]:
        """States [B, S, D] at some of the depths up to `depth`; see `Prefix.states`."""
        layers, begun = decoder_layers(self._model), self.batch(rows)
        with (
            torch.no_grad(),
            apply_plan(self._model, LayerPlan.exiting(len(layers), depth)),
            captured(layers, depths) as states,
        ):
            decoder_of(self._model)(**begun.inputs)
        return begun.whole(states)


def beginnings(
    model: PreTrainedModel, rows: Sequence[Sequence[int]], depth: int, kept: Collection[int] = ()
) -> Iterator[tuple[list[int], Beginning]]:
    """Group sequences by their common beginnings, and run each beginning once.

    Args:
        model: the full model.
        rows: token ids of all sequences.
        depth: number of layers that run the beginnings.
        kept: depths whose states are kept.

    Yields:
        The numbers of a group's sequences, longest first, and their beginning (empty if the model cannot share).
    """
    lengths = shared_lengths(rows) if can_share(model) else [0] * len(rows)
    for numbers in groups_of(rows, lengths):
        yield numbers, Beginning(model, rows[numbers[0]][: lengths[numbers[0]]], depth, kept)
