"""Token sequences as left-padded batches of like length that fit into memory."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

T = TypeVar("T")
Row = TypeVar("Row")
Result = TypeVar("Result")


def position_inputs(module: nn.Module, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """`position_ids` [B, S] as `generate()` gives them, as a keyword argument of `module`; empty if it takes none."""
    if "position_ids" not in inspect.signature(module.forward).parameters:
        return {}
    return {"position_ids": (attention_mask.long().cumsum(-1) - 1).clamp(min=0)}


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


def last_logits(model: PreTrainedModel, inputs: dict[str, torch.Tensor], counts: Sequence[int]) -> list[torch.Tensor]:
    """For each of B rows the logits [A, V] of its last A tokens; the head runs for few others where the model allows.

    Args:
        inputs: see `padded_inputs`.
        counts: A of each row.
    """
    logits = model(**inputs, use_cache=False, **head_options(model, max(counts))).logits
    return [row[-count:] for row, count in zip(logits, counts, strict=True)]


def head_options(model: PreTrainedModel, count: int) -> dict[str, int]:
    """The argument that has the head run for the last `count` tokens alone, where the model takes it."""
    return {"logits_to_keep": count} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


def in_halves(rows: Sequence[Row], run: Callable[[Sequence[Row]], list[Result]]) -> list[Result]:
    """`run(rows)`, or, where the device's memory does not suffice, the same half by half."""
    try:
        return run(rows)
    except torch.OutOfMemoryError:
        if len(rows) == 1:
            raise
    middle = len(rows) // 2
    return [*in_halves(rows[:middle], run), *in_halves(rows[middle:], run)]


def memory_budget(device: torch.device, least: int, share: float) -> int:
    """Bytes that a step may plan with: `least`, or on a CUDA device a share of its free memory if that is more.

    CPU-sized batches leave a GPU launch-bound.
    """
    return max(least, int(torch.cuda.mem_get_info(device)[0] * share)) if device.type == "cuda" else least
