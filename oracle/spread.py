"""Pick a few of many, evenly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


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
