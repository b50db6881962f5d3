"""Workers that say when they worked; in a file of its own, since the workers import it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass
class TimedWorkers:
    """Workers that note when each piece was begun, with a loaded model, and done."""

    workers: Any
    spans: list[list[float]]

    def map(self, task: Any, pieces: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        for number, (span, result) in self.workers.map(TimedTask(task), pieces):
            self.spans.append(span)
            yield number, result


@dataclass
class TimedTask:
    task: Any

    def __call__(self, piece: Any) -> tuple[list[float], Any]:
        _ = self.task.backbone
        start = time.time()
        result = self.task(piece)
        return [start, time.time()], result
