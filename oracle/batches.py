"""Which prompts run together: blocks that are labelled together, batches of like work, and an even choice of a few.

Answers round, and are cut short, according to the prompts beside them. Blocks depend on the prompts alone, neither on
the number of processes nor on what is done already. So one process and many workers give the same labels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from statistics import median
from typing import TypeVar

import numpy as np

from backbone.execution.shared_prefixes import CHARACTERS_PER_TOKEN, alike
from backbone.plan import LayerPlan
from oracle.decoding import Decoding
from oracle.prompts import Prompt

T = TypeVar("T")

BATCHES = 8
"""Batches of a block, at most, on average: plans share passes over them, and little is lost with a worker that dies."""
FEWEST_BATCHES, BLOCKS = 2, 8
"""Few prompts are cut into so many blocks, as long as each has some batches, so that no worker waits long."""
MOST_ROWS = 4
"""Rows of a batch, at most, as a multiple of the batch size: little is lost by a kill."""


def spread(items: Sequence[T], count: int) -> list[T]:
    """`count` of the items, evenly spread, in their order.

    All items where there are as many or fewer, so that no item is picked twice. First and last are among two or more;
    the last alone is picked for a count of one, none for a count below.
    """
    if count >= len(items):
        return list(items)
    if count < 2:
        return list(items[-1:]) if count == 1 else []
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def blocks(prompts: Sequence[Prompt], batch_size: int, decoding: Decoding) -> list[list[Prompt]]:
    """The prompts in blocks that begin alike, of like length and about the same work each, longest first.

    No tokenizer is needed: lengths are counted in characters.
    """
    by_id = sorted(prompts, key=lambda prompt: prompt.id)
    ordered = [by_id[number] for group in alike([prompt.prompt for prompt in by_id]) for number in group]
    tokens = [len(prompt.prompt) / CHARACTERS_PER_TOKEN + decoding.max_new_tokens for prompt in ordered]
    few, many = (-(-len(ordered) // (batches * batch_size)) for batches in (BATCHES, FEWEST_BATCHES))
    count, done = max(few, min(many, BLOCKS)), np.cumsum(tokens)
    ends = [int(np.searchsorted(done, done[-1] * number / count)) for number in range(1, count)]
    parts = zip([0, *ends], [*ends, len(ordered)], strict=True)
    return [ordered[start:end] for start, end in parts if start < end]


def wanted_in_blocks(
    wanted: Mapping[LayerPlan, Sequence[Prompt]], batch_size: int, decoding: Decoding
) -> Iterator[dict[LayerPlan, list[Prompt]]]:
    """Prompts whose labels are wanted under plans, in blocks of all these prompts; a plan without any is left out."""
    members = {plan: set(some) for plan, some in wanted.items()}
    for block in blocks(together(wanted), batch_size, decoding):
        found = {plan: [prompt for prompt in block if prompt in own] for plan, own in members.items()}
        yield {plan: some for plan, some in found.items() if some}


def together(wanted: Mapping[LayerPlan, Iterable[Prompt]]) -> list[Prompt]:
    """Every prompt that is wanted under some plan, once."""
    return list(dict.fromkeys(prompt for prompts in wanted.values() for prompt in prompts))


def packed(rows: Sequence[T], tokens: Callable[[T], int], batch_size: int) -> Iterator[list[T]]:
    """Batches of the rows in their order, each padded to no more tokens than `batch_size` rows of the median length.

    A row longer than that is a batch by itself. Rows of like length should be neighbours.
    """
    if not rows:
        return
    room = batch_size * median(map(tokens, rows))
    batch: list[T] = []
    widest = 0
    for row in rows:
        widest = max(widest, tokens(row))
        if batch and (widest * (len(batch) + 1) > room or len(batch) == MOST_ROWS * batch_size):
            yield batch
            batch, widest = [], tokens(row)
        batch.append(row)
    yield batch
