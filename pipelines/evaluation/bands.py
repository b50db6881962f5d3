"""Intervals over redrawn test prompts for the report's figures: of policies, and of curves through many of them.

Shapes: `N` prompts, `K` plans, cheapest first, the last full, `G` points of a curve.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from controller.base import ChoiceRule
from controller.certificate.calibration import choices
from controller.report.headroom import LEVEL, Estimate
from oracle.frontier.bootstrap import bootstrap_band, bootstrap_interval
from oracle.frontier.frontier import Frontiers
from oracle.frontier.split_half import corrected_path, corrected_sweep
from oracle.frontier.sweep import path, sweep

Floats = NDArray[np.float64]
Choices = NDArray[np.intp]

GRID = 61
"""Budgets at which the bands of frontiers are drawn."""


@dataclass(frozen=True, slots=True)
class Spot:
    """A policy's mean budget, mean score, and its score over the full model's, with their intervals."""

    budget: Estimate
    quality: Estimate
    kept: Estimate


@dataclass(frozen=True, slots=True)
class Band:
    """Mean scores [G] over mean budgets [G], and the ends of the scores' intervals [G]."""

    budgets: Floats
    scores: Floats
    low: Floats
    high: Floats


def spot(shares: Floats, scores: Floats, budgets: Floats) -> Spot:
    """A policy that runs plan `k` with probability `shares[i, k]` for prompt `i` [N, K]."""
    return spot_of(shares @ budgets, (shares * scores).sum(axis=1), scores[:, -1])


def spot_of(spent: Floats, won: Floats, full: Floats) -> Spot:
    """A policy by its budgets and scores for N prompts, and the full model's scores for them."""

    def kept(drawn: Choices) -> float:
        return float(won[drawn].mean() / full[drawn].mean()) if full[drawn].any() else float("nan")

    def estimate(statistic: Callable[[Choices], float]) -> Estimate:
        everyone = np.arange(len(full))
        return Estimate.of(statistic(everyone), bootstrap_interval(statistic, len(full), level=LEVEL))

    return Spot(
        budget=estimate(lambda drawn: float(spent[drawn].mean())),
        quality=estimate(lambda drawn: float(won[drawn].mean())),
        kept=estimate(kept),
    )


def price_band(predicted: NDArray[np.float32], scores: Floats, rule: ChoiceRule) -> Band:
    """A controller of expected losses [N, K] at every price: the interval of each price stands at its mean budget."""
    chosen = choices(predicted, rule)
    won, spent = scores[np.arange(len(scores)), chosen], rule.budgets[chosen].mean(axis=1)
    low, high = bootstrap_band(lambda drawn: won @ _shares(drawn), len(scores), level=LEVEL)
    return Band(spent, won.mean(axis=1), low, high)


def frontier_bands(scores: Floats, budgets: Floats) -> dict[str, Band]:
    """The hull of static plans, the oracle, and the oracle corrected for luck, by name."""
    steps, corrected = sweep(scores, budgets), corrected_sweep(scores, budgets)
    curves: dict[str, Callable[[Floats], Floats]] = {
        "mixture": lambda counts: np.array(Frontiers.of(scores, budgets, steps, counts).mixture),
        "oracle": lambda counts: path(steps, scores, budgets, counts),
        "corrected": lambda counts: corrected_path(corrected, scores, budgets, counts),
    }
    return {name: _band(curve, len(scores)) for name, curve in curves.items()}


def _band(curve: Callable[[Floats], Floats], n: int) -> Band:
    """A curve of points [S, 2], by budget, from the counts [N] of the prompts; it stays level beyond its last point."""
    points = curve(np.ones(n))
    grid = np.linspace(points[0, 0], points[-1, 0], GRID)

    def scores(drawn: Choices) -> Floats:
        return np.interp(grid, *curve(_shares(drawn) * n).T)

    low, high = bootstrap_band(scores, n, level=LEVEL)
    return Band(grid, np.interp(grid, *points.T), low, high)


def _shares(drawn: Choices) -> Floats:
    """The share of the draws that each prompt has [N]."""
    return np.bincount(drawn, minlength=len(drawn)) / len(drawn)
