"""Batches of about the same work: few long rows or many short ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from statistics import median
from typing import TypeVar

Row = TypeVar("Row")

MOST_ROWS = 4
"""Rows of a batch, at most, as a multiple of the batch size: what is lost by a kill stays small."""


def packed(rows: Sequence[Row], tokens: Callable[[Row], int], batch_size: int) -> Iterator[list[Row]]:
    """Batches of the rows in their order, each padded to no more tokens than `batch_size` rows of the median length.

    A row longer than that is a batch by itself. Rows of like length should be neighbours.
    """
    if not rows:
        return
    room = batch_size * median(map(tokens, rows))
    batch: list[Row] = []
    widest = 0
    for row in rows:
        widest = max(widest, tokens(row))
        if batch and (widest * (len(batch) + 1) > room or len(batch) == MOST_ROWS * batch_size):
            yield batch
            batch, widest = [], tokens(row)
        batch.append(row)
    yield batch
