"""Contestants on the same prompts, timed alternately: what each answered, and what it took.

Shapes: `N` prompts, `T` new tokens.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, StoppingCriteria

from backbone.families import decoder_layers
from runtime.paired_timing import synchronize

SLOW = 5.0


@dataclass(slots=True)
class Answers:
    """What a contestant generated for N prompts.

    Attributes:
        tokens: T new tokens of each prompt; empty from a contestant that gives none.
        first_token_ms: from the start of its batch to the first token of each prompt; empty where that cannot be seen.
        acceptance: of each batch, from a contestant that drafts: the share of its drafts that were kept, None without
            drafts.
    """

    tokens: list[list[int]] = field(default_factory=list)
    first_token_ms: list[float] = field(default_factory=list)
    acceptance: list[float | None] = field(default_factory=list)


@dataclass(slots=True)
class Measured:
    """One contestant's rounds.

    Attributes:
        answers: of the first round, which is a warm-up.
        seconds: of each timed round, for all N prompts.
        first_token_ms: the mean over prompts, of each timed round.
        layer_tokens: tokens times the layers that really computed them, prompts with their padding included.
        peak_bytes: device memory at its highest on a GPU, else the resident memory of the whole process.
    """

    answers: Answers
    layer_tokens: int
    peak_bytes: int
    seconds: list[float] = field(default_factory=list)
    first_token_ms: list[float] = field(default_factory=list)

    @property
    def median_seconds(self) -> float:
        return median(self.seconds)


def in_turn(
    contestants: Mapping[str, Callable[[], Answers]], model: PreTrainedModel, rounds: int, may_fail: Collection[str]
) -> dict[str, Any]:
    """Every contestant `rounds` times, all in each round, in reversed order in every second one.

    Args:
        rounds: after the warm-up; 0 to time the warm-up itself, where a round takes minutes.
        may_fail: contestants that are not ours: if the warm-up of one fails, the others go on without it, and if it
            takes more than `SLOW` times as long as the first contestant's, it is the only round.

    Returns:
        For each name a `Measured`, or the reason as a text.
    """
    found: dict[str, Any] = {}
    slowest = 0.0
    for name, run in contestants.items():
        try:
            start = time.perf_counter()
            with counting(model) as counted, peak_memory() as peak:
                answers = run()
                synchronize()
            seconds = time.perf_counter() - start
            slowest = SLOW * seconds if not found else slowest
            found[name] = Measured(answers, counted[0], peak[0])
            if not rounds or (name in may_fail and seconds > slowest):
                found[name].seconds.append(seconds)
                found[name].first_token_ms += [mean(answers.first_token_ms)] if answers.first_token_ms else []
        except Exception as error:
            if name not in may_fail:
                raise
            found[name] = f"it failed on this model: {type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
    names = [name for name, value in found.items() if isinstance(value, Measured) and not value.seconds]
    for number in range(rounds):
        for name in reversed(names) if number % 2 else names:
            synchronize()
            start = time.perf_counter()
            answers = contestants[name]()
            synchronize()
            found[name].seconds.append(time.perf_counter() - start)
            if answers.first_token_ms:
                found[name].first_token_ms.append(mean(answers.first_token_ms))
    return found


class FirstTokens(StoppingCriteria):
    """Notes when a call of `generate()` has its first token; stops nothing."""

    def __init__(self, start: float) -> None:
        self._start = start
        self.ms: float | None = None

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        if self.ms is None:
            synchronize()
            self.ms = (time.perf_counter() - self._start) * 1000
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


@contextmanager
def counting(model: PreTrainedModel) -> Iterator[list[int]]:
    """Counts tokens times layers, over all models of the same kind of layer. A layer that passes its input on, because
    a plan or a replayed prompt says so, counts nothing; one of which a sub-layer runs counts whole."""
    kind: Any = type(decoder_layers(model)[0])
    own, count = kind.forward, [0]

    @wraps(own)
    def counted(layer: nn.Module, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        count[0] += hidden_states.shape[:-1].numel()
        return own(layer, hidden_states, *args, **kwargs)

    kind.forward = counted
    try:
        yield count
    finally:
        kind.forward = own


@contextmanager
def peak_memory() -> Iterator[list[int]]:
    """The highest memory while the block runs, in bytes; on a CPU sampled every 5 ms from the process as a whole."""
    peak, ended = [0], threading.Event()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        yield peak
        peak[0] = torch.cuda.max_memory_allocated()
        return

    def watch() -> None:
        while not ended.wait(0.005):
            peak[0] = max(peak[0], _resident_bytes())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        ended.set()
        thread.join()
        peak[0] = max(peak[0], _resident_bytes())


def _resident_bytes() -> int:
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
    except OSError:  # not Linux
        return 0
