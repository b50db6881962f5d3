"""What labels say about the best that can be had: least sufficient plans, static mixtures, and the oracle's frontier.

Shapes: `N` prompts, `K` plans, cheapest first, the last full. `scores` is [N, K], `budgets` [K].
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Point = tuple[float, float]
"""(mean budget, mean score)."""


def sufficient_plans(scores: Floats, tolerance: float = 0.0) -> NDArray[np.bool_]:
    """[N, K]: a plan is sufficient for a prompt if its score is at least the full plan's less `tolerance`."""
    return scores >= scores[:, -1:] - tolerance


def least_sufficient(sufficient: NDArray[np.bool_]) -> NDArray[np.intp]:
    """[N]: index of each prompt's cheapest sufficient plan."""
    return np.asarray(sufficient.argmax(axis=1))


def static_points(scores: Floats, budgets: Floats) -> list[Point]:
    """(budget, mean score) of each plan when all prompts run it."""
    return list(zip(budgets.tolist(), scores.mean(axis=0).tolist(), strict=True))


def upper_hull(points: Sequence[Point]) -> list[Point]:
    """The concave upper boundary of points, by budget; mixtures of two neighbours reach everything between them.

    Starts at the cheapest point and ends at the best score.
    """
    hull: list[Point] = []
    for point in sorted(points, key=lambda p: (p[0], -p[1])):
        while hull and (point[0] == hull[-1][0] or _lies_below(hull, point)):
            if point[0] == hull[-1][0]:
                break
            hull.pop()
        else:
            hull.append(point)
    best = max(range(len(hull)), key=lambda i: hull[i][1])
    return hull[: best + 1]


def _lies_below(hull: Sequence[Point], point: Point) -> bool:
    """Whether the last point of the hull lies on or below the line from the one before it to `point`."""
    if len(hull) < 2:
        return False
    (x0, y0), (x1, y1) = hull[-2], hull[-1]
    return (y1 - y0) * (point[0] - x0) <= (point[1] - y0) * (x1 - x0)


def budget_at(hull: Sequence[Point], quality: float) -> float:
    """The least mean budget at which a hull reaches a quality; NaN where it never does."""
    if quality <= hull[0][1]:
        return hull[0][0]
    for (x0, y0), (x1, y1) in pairwise(hull):
        if y0 < quality <= y1:
            return x0 + (x1 - x0) * (quality - y0) / (y1 - y0)
    return float("nan")


def oracle_hull(scores: Floats, budgets: Floats) -> list[Point]:
    """The concave frontier of an oracle that knows every score: the most mean score at each mean budget.

    The relaxed multiple-choice knapsack (Glavas et al. 2024, arXiv 2410.20022, section 4, whose hull this is): every
    prompt starts at its cheapest plan and climbs its own hull; steps of all prompts are taken in order of score gained
    per budget spent. Picked with the scores in hand, so it flatters.
    """
    n_prompts = len(scores)
    start_score, steps = 0.0, []
    for row in scores:
        hull = upper_hull(list(zip(budgets.tolist(), row.tolist(), strict=True)))
        start_score += hull[0][1]
        steps += [((y1 - y0) / (x1 - x0), x1 - x0, y1 - y0) for (x0, y0), (x1, y1) in pairwise(hull)]
    budget, quality = float(budgets[0]), start_score / n_prompts
    frontier = [(budget, quality)]
    for _, spent, gained in sorted(steps, reverse=True):
        budget, quality = budget + spent / n_prompts, quality + gained / n_prompts
        frontier.append((budget, quality))
    return frontier


def captured_headroom(quality: float, budget: float, scores: Floats, budgets: Floats) -> float:
    """Share of what the oracle saves over the best mixture of static plans, at equal quality, that a policy saves.

    1 is the oracle, 0 the static mixture, NaN where the two do not differ or the quality is out of their reach.
    """
    mixture = budget_at(upper_hull(static_points(scores, budgets)), quality)
    oracle = budget_at(oracle_hull(scores, budgets), quality)
    return (mixture - budget) / (mixture - oracle) if mixture - oracle > 1e-9 else float("nan")
