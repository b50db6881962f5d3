"""The cheapest choice of one plan a prompt for a mean score, to optimality: a multiple-choice knapsack.

The problem of Glavas et al. 2024 (arXiv 2410.20022, section 4). Its relaxation, the sweep, gives a first choice and the
price of score in budget. At that price the problem falls apart into one a prompt, which bounds it. Nearly all plans are
so far from their prompt's best that no better choice can hold them. HiGHS decides about the others, the core. Source:
Kellerer, Pferschy and Pisinger 2004, Knapsack Problems, sections 11.2 (bounds), 11.3 (reduction) and 11.7 (core).

Shapes: `N` prompts, `K` plans, cheapest first, the last full. `scores` is [N, K], `budgets` [K]. Needs scipy.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from backbone.errors import InputError
from oracle.frontier.sweep import Choices, Floats, path, sweep

TOLERANCE = 1e-6
"""How far the mean budget may stay from the least possible."""

ROUNDING = 1e-9
"""By how much a mean may miss what was asked for, so that sums in another order do not count as missing it."""

CORE = 32
"""Plans in the first core, beyond one a prompt. Nearly always enough; if not, the next core is four times as large."""

SHARPNESS = 1e3
"""HiGHS lets a constraint be missed by 1e-6. In these units that is not more than `ROUNDING` for one prompt."""


class KnapsackError(InputError):
    """A mean score that no choice of plans has."""


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
    steps = sweep(scores, budgets)
    points = path(steps, scores, budgets)
    taken = int(np.searchsorted(points[:, 1], mean_score - ROUNDING))
    if taken == 0:  # the cheapest plan will do for all
        return steps.start
    spent, gained = points[taken] - points[taken - 1]
    return _solve(scores, budgets, (mean_score - ROUNDING) * len(scores), spent / gained, steps.after(taken))


def _solve(scores: Floats, budgets: Floats, wanted: float, price: float, chosen: Choices) -> Choices:
    """The cheapest choice [N] whose sum of scores is at least `wanted`, to `TOLERANCE` a prompt.

    Args:
        price: budget that a unit of score is worth; any that is not negative is valid, the relaxation's is the best.
        chosen: a choice that reaches `wanted` [N], of plans that are their prompts' best at that price.
    """
    best_before = np.maximum.accumulate(scores, axis=1)[:, :-1]
    is_better = np.concatenate([np.ones((len(scores), 1), dtype=bool), scores[:, 1:] > best_before], axis=1)
    net = np.where(is_better, budgets - price * scores, np.inf)  # no plan is needed that a cheaper one equals
    least, tolerance = net.min(axis=1), TOLERANCE * len(scores)
    regrets, bound = net - least[:, None], float(least.sum()) + price * wanted
    gap, size, ranked = float(budgets[chosen].sum()) - bound, CORE, np.sort(regrets, axis=None)
    while gap > tolerance:
        reach = min(gap - tolerance, float(ranked[min(len(chosen) + size, len(ranked)) - 1]))
        found = _solve_core(scores, budgets, wanted, regrets <= reach + ROUNDING, tolerance)
        chosen = min(chosen, found, key=lambda plans: float(budgets[plans].sum()))
        gap, size = float(budgets[chosen].sum()) - bound, 4 * size
        if gap - tolerance <= reach:  # a choice with any plan left out costs at least `bound + reach`
            break
    return chosen


def _solve_core(scores: Floats, budgets: Floats, wanted: float, core: NDArray[np.bool_], tolerance: float) -> Choices:
    """The cheapest choice [N] among the core's plans [N, K], to `tolerance` in the sum of budgets.

    Prompts with a single plan have nothing to decide. Prompts with the same plans and scores share their variables,
    which count how many of them run a plan: scores of 0 and 1 leave a handful of such groups.
    """
    free = np.flatnonzero(core.sum(axis=1) > 1)
    found: Choices = core.argmax(axis=1)
    taken = float(np.delete(scores[np.arange(len(core)), found], free).sum())
    alike = np.where(core, scores, np.inf)[free]
    _, first, group, size = np.unique(alike, axis=0, return_index=True, return_inverse=True, return_counts=True)
    owner, plan = np.nonzero(core[free[first]])
    counts = _highs(budgets[plan], scores[free[first][owner], plan], wanted - taken, owner, size, tolerance)
    found[free[np.argsort(group, kind="stable")]] = np.repeat(plan, counts)
    return found


def _highs(costs: Floats, scores: Floats, wanted: float, owner: Choices, size: Choices, tolerance: float) -> Choices:
    """How many prompts run each of V plans [V]: the least cost, to `tolerance`, with a score of at least `wanted`.

    Args:
        costs: of each plan [V].
        scores: likewise [V].
        wanted: sum of scores.
        owner: the group of each plan [V].
        size: prompts of each of G groups [G], all of which run one of its plans.
        tolerance: in the sum of costs.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    one_each = csr_array((np.ones(len(owner)), (owner, np.arange(len(owner)))), shape=(len(size), len(owner)))
    largest = np.zeros(len(size))
    np.maximum.at(largest, owner, costs)
    found = milp(
        costs,
        integrality=np.ones(len(costs)),
        bounds=Bounds(0, size[owner]),
        constraints=[
            LinearConstraint(one_each, size, size),
            LinearConstraint(SHARPNESS * scores[None], SHARPNESS * wanted, np.inf),
        ],
        options={"mip_rel_gap": tolerance / max(float(largest @ size), tolerance)},  # HiGHS divides by the sum found
    )
    counts = np.zeros(len(costs)) if found.x is None else np.rint(found.x)
    if not np.array_equal(one_each @ counts, size) or scores @ counts < wanted - ROUNDING * size.sum():
        raise RuntimeError(f"HiGHS gave no valid choice of plans though there is one: {found.message}")
    return counts.astype(np.intp)
