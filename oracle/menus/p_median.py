"""Which K plans should a menu hold? Those with which an oracle spends least: a p-median problem.

An oracle gives each prompt the plan that suits it; the fewer plans a menu holds, the more it spends at the same mean
score. The choice is the p-median problem (Hakimi 1964, Operations Research 12(3)) with a side constraint, the mean
score of the knapsack of Glavas et al. 2024 (arXiv 2410.20022, section 4). Vertex substitution (Teitz and Bart 1968,
Operations Research 16(5)) finds a good choice at once. A Lagrangian bound (Cornuejols, Fisher and Nemhauser 1977,
Management Science 23(8)) says how good it is, and betters it on the way.

Shapes: `N` prompts, `P` plans, cheapest first, the last full, `T` targets. `scores` is [N, P], `budgets` [P].
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from oracle.frontier.frontier import budget_at
from oracle.frontier.knapsack import ROUNDING
from oracle.frontier.sweep import path, sweep

Floats = NDArray[np.float64]

GAP = 1e-3
"""A choice this close to the best possible, relatively, is taken to be the best."""
STEPS, PATIENCE = 300, 10
"""Steps towards the bound, at most, the same on every machine, and those without a better bound that halve a step."""
STARTS = 5
"""Choices that such a search has come by from which plans are exchanged anew, where no bound proves one the best."""


def best_plans(scores: Floats, budgets: Floats, count: int, losses: Sequence[float], steps: int = STEPS) -> list[int]:
    """The places, ascending, of `count` plans with which an oracle spends least; the last one, the full plan, is one.

    Args:
        scores: of the prompts under all plans [N, P].
        budgets: of the plans [P].
        count: plans to choose.
        losses: shares of the full plan's mean score that the oracle may lose: targets, each weighing the same [T].
        steps: towards the bound that proves a choice the best, at most.
    """
    found = substituted(scores, budgets, count, losses)
    if len(found) == scores.shape[1]:
        return found
    return _bettered(found, scores, budgets, losses, steps)


def oracle_budget(scores: Floats, budgets: Floats, plans: Sequence[int], losses: Sequence[float]) -> float:
    """What an oracle spends with some of the plans, averaged over the targets; mixtures are allowed."""
    own, full = scores[:, plans], float(scores[:, -1].mean())
    points = path(sweep(own, budgets[plans]), own, budgets[plans])
    return float(np.mean([budget_at(points, (1 - loss) * full) for loss in losses]))


def substituted(
    scores: Floats, budgets: Floats, count: int, losses: Sequence[float], begun: Sequence[int] = ()
) -> list[int]:
    """Plans taken one after another, each the best beside those before, then exchanged while that helps.

    `begun` holds plans that are in the choice already, before any is exchanged.
    """
    full, alone = scores.shape[1] - 1, scores.mean(axis=0)

    def spent(plans: Sequence[int]) -> float:
        return round(oracle_budget(scores, budgets, sorted(plans), losses), 9)

    def best_beside(plans: Sequence[int]) -> list[int]:
        """With one more, of equally good ones that which scores most by itself."""
        more = ([*plans, plan] for plan in range(full) if plan not in plans)
        return min(more, key=lambda plans: (spent(plans), -alone[plans[-1]]))

    chosen = [*begun] or [full]
    while len(chosen) < min(count, full + 1):
        chosen = best_beside(chosen)
    least, left = spent(chosen), [plan for plan in chosen if plan != full]
    while left and len(chosen) <= full:
        plan = left.pop()
        changed = best_beside([other for other in chosen if other != plan])
        if (budget := spent(changed)) < least:
            chosen, least = changed, budget
            left = [other for other in chosen if other != full]
    return sorted(chosen)


def _bettered(plans: list[int], scores: Floats, budgets: Floats, losses: Sequence[float], steps: int) -> list[int]:
    """A choice that a lower bound proves the best, or the best of those that the search for the bound comes by.

    The bound is Lagrangian: each prompt may pay for its plan at each target (`paid` [T, N]), and a unit of score has a
    price at each target (`prices` [T]). A plan is then worth by itself what it saves prompts over what they pay, and
    the plans worth most are a choice. Both are moved along the subgradient, with Polyak's length of a step.
    """
    missing = (1 - np.array(losses))[:, None, None] * scores[:, -1].mean() - scores  # [T, N, P]
    best, least, seen = plans, oracle_budget(scores, budgets, plans, losses), dict[tuple[int, ...], float]()
    prices = np.array([_price(scores[:, plans], budgets[plans], loss) for loss in losses])
    paid = (budgets[plans] + prices[:, None, None] * missing[..., plans]).min(axis=2)
    bound, length, stale, at_bound = -np.inf, 1.0, 0, (paid, prices)
    for _ in range(steps):
        saved = np.maximum(paid[..., None] - budgets - prices[:, None, None] * missing, 0)
        worth = saved.mean(axis=(0, 1))
        chosen = sorted([*np.argsort(-worth[:-1], kind="stable")[: len(plans) - 1].tolist(), len(worth) - 1])
        value = float(paid.mean() - worth[chosen].sum())
        bound, stale, at_bound = (value, 0, (paid, prices)) if value > bound else (bound, stale + 1, at_bound)
        seen[tuple(chosen)] = spent = oracle_budget(scores, budgets, chosen, losses)
        if spent < least:
            best, least = chosen, spent
        if bound >= (1 - GAP) * least:
            return best
        if stale == PATIENCE:
            length, stale, (paid, prices) = length / 2, 0, at_bound
            continue
        paid, prices = _moved(paid, prices, saved[..., chosen] > 0, missing[..., chosen], length * (least - value))
    starts = sorted(seen.keys() - {tuple(plans)}, key=lambda choice: (seen[choice], choice))[:STARTS]
    exchanged = [substituted(scores, budgets, len(plans), losses, begun=start) for start in starts]
    return min([best, *exchanged], key=lambda plans: oracle_budget(scores, budgets, plans, losses))


def _moved(
    paid: Floats, prices: Floats, taken: NDArray[np.bool_], missing: Floats, gain: float
) -> tuple[Floats, Floats]:
    """What prompts pay, and the prices, after a step along the subgradient that would raise a linear bound by `gain`.

    `taken` says which of the K chosen plans save a prompt anything, and `missing` what they lack [T, N, K].
    """
    up, dearer = (1 - taken.sum(axis=2)) / paid.size, (taken * missing).sum(axis=(1, 2)) / paid.size
    step = gain / ((up**2).sum() + (dearer**2).sum())
    return paid + step * up, np.maximum(prices + step * dearer, 0)


def _price(scores: Floats, budgets: Floats, loss: float) -> float:
    """What an oracle that may lose so much pays for its last unit of mean score."""
    spent, reached = path(sweep(scores, budgets), scores, budgets).T
    last = int(np.searchsorted(reached, (1 - loss) * scores[:, -1].mean() - ROUNDING))
    if not 0 < last < len(reached):
        return 0.0
    return float((spent[last] - spent[last - 1]) / (reached[last] - reached[last - 1]))
