"""How many times faster is one thing than another? Rounds in turn, with an interval that says what noise allows."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import comb
from statistics import median
from typing import TypeVar

import torch
from transformers import PreTrainedModel

from backbone.execution.apply_plan import apply_plan
from backbone.plan import LayerPlan
from runtime.paired_timing import seconds_of

Name = TypeVar("Name")

FEWEST_ROUNDS = 5
"""With five paired rounds the smallest and the largest ratio hold the median between them in 94 of 100 cases."""
EXACT = 0.03
"""Half of an interval, as a share of its ratio, below which more rounds are not worth their time."""
LEVEL = 0.9


@dataclass(frozen=True, slots=True)
class Ratio:
    """How many times faster one thing is than another, over paired rounds.

    Attributes:
        value: median.
        low, high: ends of an interval that holds the true median with a probability of at least 90%; None where there
            are too few rounds for one.
        rounds: how many.
    """

    value: float
    low: float | None
    high: float | None
    rounds: int

    @property
    def is_exact(self) -> bool:
        return self.low is not None and self.high is not None and (self.high - self.low) / 2 <= EXACT * self.value

    @property
    def exceeds_noise(self) -> bool:
        """Whether the figure is worth printing: it is exact, or its interval leaves no doubt on which side of 1."""
        if self.low is None or self.high is None:
            return False
        return self.is_exact or not self.low <= 1 <= self.high


def paired_ratio(yardstick: Sequence[float], seconds: Sequence[float]) -> Ratio:
    """How many times faster than a yardstick, from seconds of both in the same rounds.

    The interval is that of order statistics for a median, which assumes nothing of the noise (Conover 1999, Practical
    Nonparametric Statistics, section 3.2).
    """
    ratios = sorted(a / b for a, b in zip(yardstick, seconds, strict=True))
    n = len(ratios)
    outside = [sum(comb(n, i) for i in range(cut)) / 2 ** (n - 1) for cut in range(1, (n + 1) // 2 + 1)]
    cut = sum(1 - share >= LEVEL for share in outside)
    value = float(median(ratios))
    return Ratio(value, ratios[cut - 1], ratios[n - cut], n) if cut else Ratio(value, None, None, n)


def paired_seconds(
    work: Mapping[Name, Callable[[], object]],
    pairs: Sequence[tuple[Name, Name]],
    *,
    rounds: int,
    seconds: float,
    advance: Callable[[], None] = lambda: None,
) -> dict[Name, list[float]]:
    """Times of each piece of work, all in turn in each round, after a round of warm-up.

    Args:
        pairs: (yardstick, other) whose ratios are wanted; once all are exact no further round begins.
        rounds: at most so many.
        seconds: no round begins later than this, once there are `FEWEST_ROUNDS`.
        advance: called after each piece of work.
    """
    found: dict[Name, list[float]] = {name: [] for name in work}
    began = time.perf_counter()
    for done in range(rounds + 1):
        kept = done - 1
        exact = kept >= FEWEST_ROUNDS and all(paired_ratio(found[a], found[b]).is_exact for a, b in pairs)
        if exact or (kept >= FEWEST_ROUNDS and time.perf_counter() - began > seconds):
            break
        for name, run in work.items():
            took = seconds_of(run)
            if done:
                found[name].append(took)
            advance()
    return found


def generation_under(
    model: PreTrainedModel, inputs: Mapping[str, torch.Tensor], plan: LayerPlan, n_tokens: int
) -> Callable[[], object]:
    """Greedy generation of exactly `n_tokens` for each row of `inputs` under a plan."""

    def generate() -> object:
        with apply_plan(model, plan):
            return model.generate(**inputs, max_new_tokens=n_tokens, min_new_tokens=n_tokens, do_sample=False)  # type: ignore[operator]

    return generate
