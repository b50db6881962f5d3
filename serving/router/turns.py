"""A queue in which each sender has its turn, however many requests another one has sent."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from typing import Generic, TypeVar

T = TypeVar("T")


class Turns(Generic[T]):
    """Of each sender the earliest item in turn."""

    def __init__(self) -> None:
        self._queues: dict[Hashable, deque[T]] = {}

    def __bool__(self) -> bool:
        return bool(self._queues)

    def put(self, sender: Hashable, item: T) -> None:
        self._queues.setdefault(sender, deque()).append(item)

    def next(self) -> T:
        """The item that `take` gives. Raises StopIteration where there is none."""
        return next(iter(self._queues.values()))[0]

    def take(self) -> T:
        sender = next(iter(self._queues))
        queue = self._queues.pop(sender)
        item = queue.popleft()
        if queue:
            self._queues[sender] = queue
        return item
