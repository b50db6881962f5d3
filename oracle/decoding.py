"""How answers are generated, and where their text ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Decoding:
    """How answers are generated: greedily, until a stop string, the end of text, or `max_new_tokens`."""

    max_new_tokens: int
    stop: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"greedy max_new_tokens={self.max_new_tokens} stop={list(self.stop)!r}"


def cut_at_stop(text: str, stop: Sequence[str]) -> str:
    """The text up to the first stop string, without outer white space."""
    for string in stop:
        text = text.split(string, 1)[0]
    return text.strip()
