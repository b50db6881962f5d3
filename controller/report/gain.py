"""What a policy saves and gains against rivals, each at any price: at equal score and at equal budget, with intervals.

Shapes: `N` prompts, `T` prices of a rival, or its plans.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from controller.report.frontier_card import LEVEL, Estimate
from oracle.frontier.bootstrap import percentile_interval
from oracle.frontier.frontier import budget_at, upper_hull

Floats = NDArray[np.float64]

REPEATS = 400
"""Redrawn sets of prompts behind each interval."""


@dataclass(frozen=True, slots=True)
class Curve:
    """What a rival spends and scores on each prompt at each of its prices [T, N] each."""

    budgets: Floats
    scores: Floats


@dataclass(frozen=True, slots=True)
class Gain:
    """Against one rival; above 0 the policy is better.

    Attributes:
        budget_saved: share of the decoder that the rival runs in addition where it has the policy's mean score, or its
            own best score if that is lower.
        score_gained: what the policy scores in addition where the rival has its budget, in shares of the full score.
    """

    budget_saved: Estimate
    score_gained: Estimate


def gains(budgets: Floats, scores: Floats, full: Floats, rivals: Mapping[str, Curve]) -> dict[str, Gain]:
    """Gain over each rival, whose prices may be mixed at random, with intervals over the same redrawn prompts.

    Args:
        budgets: that the policy runs for each prompt [N].
        scores: that it gets [N].
        full: that the full model gets [N].
        rivals: name -> what it would have spent and scored.
    """
    n, random = len(budgets), np.random.default_rng(0)
    counts = [np.bincount(random.integers(0, n, n), minlength=n) / n for _ in range(REPEATS)]

    def figures(rival: Curve, weights: Floats) -> tuple[float, float]:
        hull = np.array(upper_hull(list(zip(rival.budgets @ weights, rival.scores @ weights, strict=True))))
        budget, score = float(budgets @ weights), float(scores @ weights)
        saved = budget_at(hull, min(score, float(hull[-1, 1]))) - budget
        gained = (score - float(np.interp(budget, *hull.T))) / max(float(full @ weights), 1e-12)
        return saved, gained

    found = {}
    for name, rival in rivals.items():
        values = figures(rival, np.full(n, 1 / n))
        drawn = np.array([figures(rival, weights) for weights in counts])
        ends = [percentile_interval(column, LEVEL) for column in drawn.T]
        found[name] = Gain(*(Estimate(value, low, high) for value, (low, high) in zip(values, ends, strict=True)))
    return found
