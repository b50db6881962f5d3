"""The share of the headroom that policies capture at several losses, with intervals, side by side with controls.

Shapes: `N` prompts, `K` plans, cheapest first, the last full.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from oracle.frontier.bootstrap import percentile_interval
from oracle.frontier.frontier import Frontiers
from oracle.frontier.upgrades import climb

Floats = NDArray[np.float64]
Choices = NDArray[np.intp]

REPEATS, LEVEL = 400, 0.9
"""Redrawn sets of prompts behind each interval, and the share of them inside it."""


@dataclass(frozen=True, slots=True)
class Captured:
    """What one policy captures on N prompts; None where it is not defined.

    Attributes:
        value: share of the headroom at the policy's own mean score.
        low: end of its bootstrap interval over prompts.
        high: the other end.
        beats: share of the redrawn sets of prompts in which it captures more than the control that does best there;
            None for the controls.
    """

    value: float | None
    low: float | None
    high: float | None
    beats: float | None


def captured_by(
    policies: Mapping[str, Choices], scores: Floats, budgets: Floats, controls: frozenset[str] = frozenset()
) -> dict[str, Captured]:
    """For each policy, a choice of plan for each prompt [N], what it captures, on the same redrawn sets of prompts."""
    steps, everyone = climb(scores, budgets), np.arange(len(scores))
    spent = {name: (scores[everyone, chosen], budgets[chosen]) for name, chosen in policies.items()}

    def captured(drawn: Choices) -> dict[str, float]:
        counts = np.bincount(drawn, minlength=len(scores)).astype(np.float64)
        found = Frontiers.of(scores, budgets, steps, counts)
        return {
            name: found.captured(float(quality[drawn].mean()), float(budget[drawn].mean()))
            for name, (quality, budget) in spent.items()
        }

    random = np.random.default_rng(0)
    draws = [captured(random.integers(0, len(scores), len(scores))) for _ in range(REPEATS)]
    values, redrawn = captured(everyone), {name: np.array([draw[name] for draw in draws]) for name in policies}
    rivals = [redrawn[name] for name in policies if name in controls]
    best = np.max([np.nan_to_num(rival, nan=-np.inf) for rival in rivals], axis=0) if rivals else None
    return {name: _captured(values[name], redrawn[name], None if name in controls else best) for name in policies}


def _captured(value: float, redrawn: Floats, rival: Floats | None) -> Captured:
    low, high = percentile_interval(redrawn, LEVEL)
    beats = None if rival is None else float((np.nan_to_num(redrawn, nan=-np.inf) > rival).mean())
    whole = [None if np.isnan(number) else float(number) for number in (value, low, high)]
    return Captured(whole[0], whole[1], whole[2], beats)
