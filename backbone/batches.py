"""Token sequences as left-padded batches of like length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from transformers import PreTrainedModel

from backbone.positions import position_inputs

T = TypeVar("T")


def padded_inputs(model: PreTrainedModel, rows: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
    """`input_ids`, `attention_mask` and, where the model takes them, `position_ids` [B, S] of rows of token ids."""
    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(rows):
        ids[row, longest - len(tokens) :] = torch.tensor(tokens)
        mask[row, longest - len(tokens) :] = 1
    mask = mask.to(model.device)
    return {"input_ids": ids.to(model.device), "attention_mask": mask, **position_inputs(model, mask)}


def by_tokens(items: Sequence[T], lengths: Sequence[int], batch_tokens: int) -> list[list[T]]:
    """The items in batches of like length: at most `batch_tokens` tokens each with their padding, at least one item.

    Longest first, so that too little memory shows at once.
    """
    order = sorted(range(len(items)), key=lambda index: (-lengths[index], index))
    batches: list[list[T]] = []
    longest = 0
    for index in order:
        if not batches or (len(batches[-1]) + 1) * longest > batch_tokens:
            batches.append([])
            longest = lengths[index]
        batches[-1].append(items[index])
    return batches
