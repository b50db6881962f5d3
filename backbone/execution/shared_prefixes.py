"""Run the common beginning of many token sequences once, and go on from copies of its KV cache.

A batch is left-padded as always; only its first columns come from the cache. A row that is shorter than the longest by
n tokens computes the last n tokens of the common beginning anew, so that no row is padded in its middle. Positions,
masks and sliding windows are thus those of the plain batch.

Shapes: `B` sequences, `S` tokens of the longest, `C` columns computed already, `P` tokens of a beginning, `D` hidden
size.
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
"""Tokens of a beginning, and sequences that share it, from which on sharing pays."""
CHARACTERS_PER_TOKEN, NEIGHBOURS = 4, 4096
"""Of usual text; sequences of one group, at most, since finding groups takes time in proportion."""


def shared_lengths(rows: Sequence[Sequence[Any]], shortest: int = SHORTEST) -> list[int]:
    """For each sequence how much of its beginning runs once for its whole group; 0 for a sequence of no group.

    The groups are those that save most. Sequences of one group have the same beginning.

    Args:
        rows: token ids, or texts.
        shortest: items of a beginning, at least.
    """
    order = sorted(range(len(rows)), key=lambda number: tuple(rows[number]))
    lengths = [0] * len(rows)
    saved, starts, shared = np.zeros(len(rows) + 1), [0] * (len(rows) + 1), [0] * (len(rows) + 1)
    common = np.zeros(len(rows), dtype=np.int64)  # of the sequence at each place up to the newest
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
    """Numbers of sequences with the same beginning of these lengths, longest first in and among groups."""
    groups: dict[Any, list[int]] = defaultdict(list)
    for number in sorted(range(len(rows)), key=lambda number: -len(rows[number])):
        groups[tuple(rows[number][: lengths[number]])].append(number)
    return list(groups.values())


def alike(texts: Sequence[str]) -> list[list[int]]:
    """Numbers of texts that begin alike, longest first in and among groups; needs no tokenizer."""
    return groups_of(texts, shared_lengths(texts, SHORTEST * CHARACTERS_PER_TOKEN))


def can_share(model: PreTrainedModel) -> bool:
    """Whether keys and values of a beginning are the same whatever follows, and a cache holds nothing else."""
    config: Any = decoder_of(model).config
    kinds = {type(layer) for layer in DynamicCache(config=config).layers}
    stretched = "longrope" in (text := repr(config.to_dict())) or "'dynamic'" in text  # depends on the whole length
    return bool(kinds) and kinds <= {DynamicLayer, DynamicSlidingWindowLayer} and not stretched


@dataclass(frozen=True, slots=True, eq=False)
class Begun:
    """A left-padded batch of B sequences whose first C columns were computed already.

    Attributes:
        input_ids, mask: [B, S].
        columns: C, 0 for none.
        cache: of these columns.
        states: by depth, of these columns [B, C, D].
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
        """Arguments of the decoder for the pass over the other columns."""
        ids = self.input_ids[:, self.columns :]
        positions = {name: value[:, self.columns :] for name, value in self.positions.items()}
        return {"input_ids": ids, "attention_mask": self.mask, "cache": self.cache, "use_cache": True, **positions}

    def whole(self, states: Mapping[int, torch.Tensor]) -> dict[int, torch.Tensor]:
        """States of all columns [B, S, D], from those that the pass gave [B, S - C, D]."""
        return {d: torch.cat([self.states[d], new], 1) if self.columns else new for d, new in states.items()}


class Beginning:
    """What sequences begin with, run once through the first `depth` layers without healing.

    Args:
        tokens: P of them; none where nothing is shared.
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
        """Sequences that begin like this as a batch. At least one token of each is left to compute."""
        found = padded_inputs(self._model, rows)
        ids, mask = found.pop("input_ids"), found.pop("attention_mask")
        config: Any = decoder_of(self._model).config
        cache, width = DynamicCache(config=config), ids.shape[1]
        columns = width - max(len(row) - min(len(self.tokens), len(row) - 1) for row in rows)
        if columns < 1:
            return Begun(ids, mask, 0, cache, {}, found)
        padding = torch.tensor([[width - len(row)] for row in rows])
        places = (torch.arange(columns) - padding).clamp(min=0).to(ids.device)  # those of padding are masked
        for index, pair in enumerate(self._prefix.keys_values):
            keys, values = (tensor[0].transpose(0, 1)[places.to(tensor.device)].transpose(1, 2) for tensor in pair)
            cache.update(keys, values, index)
        states = zip(self._kept, (state[0][places.to(state.device)] for state in self._prefix.states), strict=True)
        return Begun(ids, mask, columns, cache, dict(states), found)

    def states(self, rows: Sequence[Sequence[int]], depth: int, depths: Collection[int]) -> dict[int, torch.Tensor]:
        """States [B, S, D] before some of the first `depth` layers, or after them; see `Prefix.states`."""
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
    """Groups of sequences, each with what all of its sequences begin with; groups of a model that cannot share too.

    Args:
        rows: token ids of all sequences.
        depth: layers that the beginnings run through.
        kept: depths whose states are kept.

    Yields:
        Numbers of the sequences, longest first, and their beginning.
    """
    lengths = shared_lengths(rows) if can_share(model) else [0] * len(rows)
    for numbers in groups_of(rows, lengths):
        yield numbers, Beginning(model, rows[numbers[0]][: lengths[numbers[0]]], depth, kept)
