"""The best choice of one plan a prompt under a mean budget, and the cheapest one for a mean score, to optimality.

The multiple-choice knapsack of Glavas et al. 2024 (arXiv 2410.20022, section 4), both ways round. Its relaxation, the
climb, gives a first choice and the price of score in budget; `oracle.frontier.multiple_choice` starts from these. Needs
scipy.

Shapes: `N` prompts, `K` plans, cheapest first, the last full. `scores` is [N, K], `budgets` [K].
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from backbone.errors import InputError
from oracle.frontier.multiple_choice import ROUNDING, Knapsack, solve
from oracle.frontier.upgrades import Choices, Floats, climb, path


class KnapsackError(InputError):
    """A mean budget or a mean score that no choice of plans has."""


def best_choices(scores: Floats, budgets: Floats, mean_budget: float) -> Choices:
    """[N] plans with the most mean score among all choices whose mean budget is at most `mean_budget`.

    Raises:
        KnapsackError: `mean_budget` is less than the cheapest plan's.
    """
    if not mean_budget >= budgets[0] - ROUNDING:
        raise KnapsackError(
            f"no choice of plans has a mean budget of {mean_budget:.6g} or less; ask for {budgets[0]:.6g} or more"
        )
    steps = climb(scores, budgets)
    points = path(steps, scores, budgets)
    taken = int(np.searchsorted(points[:, 0], mean_budget + ROUNDING, side="right")) - 1
    if taken == len(points) - 1:  # every prompt has its best score
        return steps.after(taken)
    spent, gained = points[taken + 1] - points[taken]
    costs = np.broadcast_to(budgets, scores.shape)
    return solve(Knapsack(scores, costs, mean_budget, _undominated(scores)), gained / spent, steps.after(taken))


def cheapest_choices(scores: Floats, budgets: Floats, mean_score: float) -> Choices:
    """[N] plans with the least mean budget among all choices whose mean score is at least `mean_score`.

    Raises:
        KnapsackError: `mean_score` is more than every prompt's best plan gives.
    """
    most = float(scores.max(axis=1).mean())
    if not mean_score <= most + ROUNDING:
        raise KnapsackError(
            f"no choice of plans has a mean score of {mean_score:.6g} or more; ask for {most:.6g} or less"
        )
    steps = climb(scores, budgets)
    points = path(steps, scores, budgets)
    taken = int(np.searchsorted(points[:, 1], mean_score - ROUNDING))
    if taken == 0:  # the cheapest plan will do for all
        return steps.start
    spent, gained = points[taken] - points[taken - 1]
    values = np.broadcast_to(-budgets, scores.shape)
    return solve(Knapsack(values, -scores, -mean_score, _undominated(scores)), spent / gained, steps.after(taken))


def _undominated(scores: Floats) -> NDArray[np.bool_]:
    """[N, K]: whether a plan scores more than every cheaper one of its prompt; the others are never needed."""
    best_before = np.maximum.accumulate(scores, axis=1)[:, :-1]
    return np.concatenate([np.ones((len(scores), 1), dtype=bool), scores[:, 1:] > best_before], axis=1)
