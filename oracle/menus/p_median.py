"""Which K plans should a menu hold? Those with which an oracle spends least: a p-median problem.

An oracle gives each prompt the plan that suits it; the fewer plans a menu holds, the more it spends at the same mean
score. The choice is the p-median problem (Hakimi 1964, Operations Research 12(3)) with a side constraint, the mean
score of the knapsack of Glavas et al. 2024 (arXiv 2410.20022, section 4). Vertex substitution (Teitz and Bart 1968,
Operations Research 16(5)) finds a good choice at once; HiGHS betters it.

Shapes: `N` prompts, `P` plans, cheapest first, the last full, `T` targets. `scores` is [N, P], `budgets` [P].
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array, hstack, identity, kron, vstack

from oracle.frontier.frontier import budget_at
from oracle.frontier.sweep import path, sweep

Floats = NDArray[np.float64]

GAP = 1e-3
"""A choice this close to the best possible, relatively, is taken to be the best."""
NODES = 50
"""Nodes of the search tree after which HiGHS gives the best choice so far, the same on every machine."""


def best_plans(scores: Floats, budgets: Floats, count: int, losses: Sequence[float], nodes: int = NODES) -> list[int]:
    """The places, ascending, of `count` plans with which an oracle spends least; the last one, the full plan, is one.

    Args:
        scores: of the prompts under all plans [N, P].
        budgets: of the plans [P].
        count: plans to choose.
        losses: shares of the full plan's mean score that the oracle may lose: targets, each weighing the same [T].
        nodes: of HiGHS's search tree, at most.
    """
    found = substituted(scores, budgets, count, losses)
    if len(found) == scores.shape[1]:
        return found
    other = _solved(scores, budgets, count, losses, nodes) or found
    return min(found, other, key=lambda plans: oracle_budget(scores, budgets, plans, losses))


def oracle_budget(scores: Floats, budgets: Floats, plans: Sequence[int], losses: Sequence[float]) -> float:
    """What an oracle spends with some of the plans, averaged over the targets; mixtures are allowed."""
    own, full = scores[:, plans], float(scores[:, -1].mean())
    points = path(sweep(own, budgets[plans]), own, budgets[plans])
    return float(np.mean([budget_at(points, (1 - loss) * full) for loss in losses]))


def substituted(scores: Floats, budgets: Floats, count: int, losses: Sequence[float]) -> list[int]:
    """Plans taken one after another, each the best beside those before, then exchanged while that helps."""
    full, alone = scores.shape[1] - 1, scores.mean(axis=0)

    def spent(plans: Sequence[int]) -> float:
        return round(oracle_budget(scores, budgets, sorted(plans), losses), 9)

    def best_beside(plans: Sequence[int]) -> list[int]:
        """With one more, of equally good ones that which scores most by itself."""
        more = ([*plans, plan] for plan in range(full) if plan not in plans)
        return min(more, key=lambda plans: (spent(plans), -alone[plans[-1]]))

    chosen = [full]
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


def _solved(scores: Floats, budgets: Floats, count: int, losses: Sequence[float], nodes: int) -> list[int] | None:
    """HiGHS's choice; None where so few nodes hold none.

    The variables are whether each plan is in the menu [P], then the share of each plan for each target and prompt
    [T, N, P].
    """
    (n, p), t = scores.shape, len(losses)
    rows, size = t * n, t * n * p
    least = (1 - np.array(losses)) * scores[:, -1].mean()
    in_menu = csr_array(np.concatenate([np.ones(p), np.zeros(size)])[None])
    shares = hstack([csr_array((rows, p)), kron(identity(rows), np.ones((1, p)))])
    only_if_in_menu = hstack([vstack([-identity(p)] * rows), identity(size)])
    mean_score = hstack([csr_array((t, p)), kron(identity(t), scores.reshape(1, -1) / n)])
    result = milp(
        np.concatenate([np.zeros(p), np.tile(budgets / rows, rows)]),
        integrality=np.concatenate([np.ones(p), np.zeros(size)]),
        bounds=Bounds(np.concatenate([np.zeros(p - 1), np.ones(1), np.zeros(size)]), 1.0),
        constraints=[
            LinearConstraint(in_menu, count, count),
            LinearConstraint(shares, 1.0, 1.0),
            LinearConstraint(only_if_in_menu, -np.inf, 0.0),
            LinearConstraint(mean_score, least, np.inf),
        ],
        options={"node_limit": nodes, "mip_rel_gap": GAP},
    )
    return None if result.x is None else np.flatnonzero(result.x[:p] > 0.5).tolist()
