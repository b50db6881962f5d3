"""What labels say about the best that can be had: least sufficient plans, static mixtures, and the oracle's frontier.

Shapes: `N` prompts, `K` plans, cheapest first, the last full. `scores` is [N, K], `budgets` [K].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from oracle.frontier.knapsack import ROUNDING, cheapest_choices
from oracle.frontier.sweep import Floats, Sweep, path, sweep

Point = tuple[float, float]
"""(mean budget, mean score)."""


def sufficient_plans(scores: Floats, tolerance: float = 0.0) -> NDArray[np.bool_]:
    """[N, K]: a plan is sufficient for a prompt if its score is at least the full plan's less `tolerance`."""
    return scores >= scores[:, -1:] - tolerance


def least_sufficient(sufficient: NDArray[np.bool_]) -> NDArray[np.intp]:
    """[N]: index of each prompt's cheapest sufficient plan."""
    return np.asarray(sufficient.argmax(axis=1))


def surely_sufficient(sufficient: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """[N, K]: whether a plan is sufficient together with every larger one of the menu, so that it is not so by luck."""
    return np.logical_and.accumulate(sufficient[:, ::-1], axis=1)[:, ::-1]


def static_points(scores: Floats, budgets: Floats) -> list[Point]:
    """(budget, mean score) of each plan when all prompts run it."""
    return _points(budgets, scores.mean(axis=0))


def _points(budgets: Floats, qualities: Floats) -> list[Point]:
    return list(zip(budgets.tolist(), qualities.tolist(), strict=True))


def upper_hull(points: Sequence[Point]) -> list[Point]:
    """The concave upper boundary of points, by budget; mixtures of two neighbours reach everything between them.

    Starts at the cheapest point and ends at the best score.
    """
    hull: list[Point] = []
    for point in sorted(points, key=lambda p: (p[0], -p[1])):
        if hull and point[0] == hull[-1][0]:
            continue
        while _lies_below(hull, point):
            hull.pop()
        hull.append(point)
    best = max(range(len(hull)), key=lambda i: hull[i][1])
    return hull[: best + 1]


def _lies_below(hull: Sequence[Point], point: Point) -> bool:
    """Whether the last point of the hull lies on or below the line from the one before it to `point`."""
    if len(hull) < 2:
        return False
    (x0, y0), (x1, y1) = hull[-2], hull[-1]
    return (y1 - y0) * (point[0] - x0) <= (point[1] - y0) * (x1 - x0)


def budget_at(curve: Sequence[Point] | Floats, quality: float) -> float:
    """The least mean budget at which a curve of points, by budget, reaches a quality; NaN where it never does."""
    budgets, scores = np.asarray(curve, dtype=np.float64).T
    reached = np.flatnonzero(scores >= quality - ROUNDING)
    if not len(reached):
        return float("nan")
    if (after := reached[0]) == 0:
        return float(budgets[0])
    before = after - 1
    share = min((quality - scores[before]) / (scores[after] - scores[before]), 1.0)
    return float(budgets[before] + (budgets[after] - budgets[before]) * share)


def oracle_hull(scores: Floats, budgets: Floats) -> list[Point]:
    """The concave frontier of an oracle that knows every score: the most mean score at each mean budget.

    The hull of the multiple-choice knapsack of Glavas et al. 2024 (arXiv 2410.20022, section 4), mixtures allowed.
    Picked with the scores in hand, so it flatters.
    """
    return _points(*path(sweep(scores, budgets), scores, budgets).T)


@dataclass(frozen=True, slots=True)
class Frontiers:
    """The two frontiers that policies lie between, over the same prompts.

    Attributes:
        mixture: the hull of static plans, which knows nothing of the prompt.
        oracle: points [S + 1, 2] of the oracle's hull, which knows its scores.
        full: mean score of the full plan.
    """

    mixture: Sequence[Point]
    oracle: Floats
    full: float

    @classmethod
    def of(cls, scores: Floats, budgets: Floats, steps: Sweep | None = None, counts: Floats | None = None) -> Frontiers:
        """Of these prompts, each counted `counts[i]` times [N], once if None. `steps`: their sweep, if it is known."""
        qualities = np.average(scores, axis=0, weights=counts)
        known = sweep(scores, budgets) if steps is None else steps
        hull = upper_hull(_points(budgets, qualities))
        return cls(hull, path(known, scores, budgets, counts), float(qualities[-1]))

    def headroom(self) -> float:
        """What the oracle saves over the best mixture, at the full plan's quality, in shares of the decoder.

        Always defined, since both reach that quality. Where a static plan is as good as the full one, what that saves
        is not the oracle's merit and not counted.
        """
        return budget_at(self.mixture, self.full) - budget_at(self.oracle, self.full)

    def captured(self, quality: float, budget: float) -> float:
        """Share of what the oracle saves over the best mixture, at `quality`, that a policy of that `budget` saves.

        1 is the oracle, 0 the mixture, NaN where the two do not differ. A quality above that of every mixture is held
        against the best of them, so that what such a policy captures is not overstated.
        """
        reached = min(quality, self.mixture[-1][1])
        mixture, oracle = budget_at(self.mixture, reached), budget_at(self.oracle, reached)
        return (mixture - budget) / (mixture - oracle) if mixture - oracle > ROUNDING else float("nan")


def headroom(scores: Floats, budgets: Floats) -> float:
    """See `Frontiers.headroom`."""
    return Frontiers.of(scores, budgets).headroom()


def captured_headroom(quality: float, budget: float, scores: Floats, budgets: Floats) -> float:
    """See `Frontiers.captured`."""
    return Frontiers.of(scores, budgets).captured(quality, budget)


def equal_mean_budget(scores: Floats, budgets: Floats) -> float:
    """The least mean budget at which some choice of one plan a prompt has the full plan's mean score.

    The figure of Glavas et al. 2024 (arXiv 2410.20022, section 4). A prompt may lose if others win as much, and the
    scores are in the oracle's hand, so it flatters.
    """
    return float(budgets[cheapest_choices(scores, budgets, float(scores[:, -1].mean()))].mean())


def own_score_budget(sufficient: NDArray[np.bool_], budgets: Floats) -> float:
    """Mean budget if each prompt runs its cheapest surely sufficient plan: the stricter figure, no prompt may lose.

    Args:
        sufficient: whether each plan is sufficient for each prompt [N, K]; the last column is True.
        budgets: of each plan [K].
    """
    return float(budgets[least_sufficient(surely_sufficient(sufficient))].mean())
