"""The multiple-choice knapsack problem: one plan a prompt, the most value at a limited mean cost, to optimality.

A price on cost turns the problem into one a prompt, which bounds it; at that price nearly all plans are so far from
their prompt's best that no choice with them can beat the one in hand. HiGHS decides about the others, the core. Source:
Kellerer, Pferschy and Pisinger 2004, Knapsack Problems, sections 11.2 (bounds), 11.3 (reduction) and 11.7 (core).

Shapes: `N` prompts, `K` plans. Needs scipy.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from oracle.frontier.upgrades import Choices, Floats

Bools = NDArray[np.bool_]

TOLERANCE = 1e-6
"""How far the mean value may stay from the best possible."""

ROUNDING = 1e-9
"""By how much a mean may miss what was asked for, so that sums in another order do not count as missing it."""

CORE = 32
"""Plans in the first core, beyond one a prompt. Nearly always enough; if not, the next core is four times as large."""

SHARPNESS = 1e3
"""HiGHS lets a constraint be missed by 1e-6. In these units that is not more than `ROUNDING` for one prompt."""


@dataclass(frozen=True, slots=True)
class Knapsack:
    """Choose one plan a prompt: the most value at a mean cost of at most `limit`.

    Attributes:
        values: of each prompt's plans [N, K].
        costs: likewise [N, K].
        limit: on the mean cost.
        allowed: plans that may be chosen [N, K].
    """

    values: Floats
    costs: Floats
    limit: float
    allowed: Bools

    def value(self, chosen: Choices) -> float:
        """Sum over the prompts."""
        return float(self.values[np.arange(len(chosen)), chosen].sum())

    @property
    def total(self) -> float:
        """The limit on the sum of the costs."""
        return (self.limit + ROUNDING) * len(self.costs)


def solve(knapsack: Knapsack, price: float, chosen: Choices) -> Choices:
    """The best choice [N], to `TOLERANCE`.

    Args:
        knapsack: the problem.
        price: value that a unit of cost is worth; any that is not negative is valid, the relaxation's is the sharpest.
        chosen: a choice within the limit [N], of plans that are their prompts' best at that price.
    """
    net = np.where(knapsack.allowed, knapsack.values - price * knapsack.costs, -np.inf)
    best = net.max(axis=1)
    regrets, bound = best[:, None] - net, float(best.sum()) + price * knapsack.total
    tolerance = _gain_that_counts(knapsack.values)
    gap, size, ranked = bound - knapsack.value(chosen), CORE, np.sort(regrets, axis=None)
    while gap > tolerance:
        reach = min(gap - tolerance, float(ranked[min(len(chosen) + size, len(ranked)) - 1]))
        chosen = _solve_core(knapsack, regrets <= reach + ROUNDING, chosen, tolerance)
        gap, size = bound - knapsack.value(chosen), 4 * size
        if gap - tolerance <= reach:  # a choice with any plan left out is worth at most `bound - reach`
            break
    return chosen


def _gain_that_counts(values: Floats) -> float:
    """How far the sum of values [N, K] may stay from a bound on it.

    That is `TOLERANCE` a prompt or, if larger, a bit less than the values' grain: the largest number of which all their
    differences are multiples, 1 for scores of 0 and 1. A better choice gains at least that, so a smaller gap is none.
    """
    let_go = TOLERANCE * len(values)
    rest = np.unique(values) - values.min()
    rest = rest[rest > ROUNDING]
    while len(rest):  # Euclid's algorithm, on all differences together
        grain = float(rest.min())
        if grain <= let_go:
            break
        over = np.abs(rest - grain * np.rint(rest / grain))
        if not len(over := over[over > ROUNDING]):
            return max(0.9 * grain, let_go)
        rest = np.append(over, grain)
    return let_go


def _solve_core(knapsack: Knapsack, core: Bools, chosen: Choices, tolerance: float) -> Choices:
    """The best choice [N] among the core's plans [N, K], to `tolerance` in the sum of values; at least `chosen`.

    Prompts with a single plan have nothing to decide. Prompts with the same plans, values and costs share their
    variables, which count how many of them run a plan: scores of 0 and 1 leave a handful of such groups.
    """
    free, found = np.flatnonzero(core.sum(axis=1) > 1), core.argmax(axis=1)
    taken = float(np.delete(knapsack.costs[np.arange(len(core)), found], free).sum())
    matrices = [np.where(core, matrix, np.inf)[free] for matrix in (knapsack.values, knapsack.costs)]
    alike = np.concatenate(matrices, axis=1)
    _, first, group, size = np.unique(alike, axis=0, return_index=True, return_inverse=True, return_counts=True)
    owner, plan = np.nonzero(core[free[first]])
    prompt = free[first][owner]
    values, costs = knapsack.values[prompt, plan], knapsack.costs[prompt, plan]
    counts = _highs(values, costs, knapsack.total - taken, owner, size, tolerance)
    found[free[np.argsort(group, kind="stable")]] = np.repeat(plan, counts)
    return max(chosen, found, key=knapsack.value)


def _highs(values: Floats, costs: Floats, limit: float, owner: Choices, size: Choices, tolerance: float) -> Choices:
    """How many prompts run each of V plans [V]: the most value, to `tolerance`, with at most `limit` cost.

    Args:
        values: of each plan [V].
        costs: likewise [V].
        limit: on the sum of costs.
        owner: the group of each plan [V].
        size: prompts of each of G groups [G], all of which run one of its plans.
        tolerance: in the sum of values.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    one_each = csr_array((np.ones(len(owner)), (owner, np.arange(len(owner)))), shape=(len(size), len(owner)))
    within = LinearConstraint(SHARPNESS * costs[None], -np.inf, SHARPNESS * limit)
    largest = np.zeros(len(size))
    np.maximum.at(largest, owner, np.abs(values))
    relative = tolerance / max(float(largest @ size), tolerance)  # HiGHS divides its gap by the sum that it found
    found = milp(
        -values,
        integrality=np.ones(len(values)),
        bounds=Bounds(0, size[owner]),
        constraints=[LinearConstraint(one_each, size, size), within],
        options={"mip_rel_gap": relative},
    )
    counts = np.zeros(len(values)) if found.x is None else np.rint(found.x)
    if not np.array_equal(one_each @ counts, size) or costs @ counts > limit + ROUNDING * size.sum():
        raise RuntimeError(f"HiGHS gave no valid choice of plans though there is one: {found.message}")
    return counts.astype(np.intp)
