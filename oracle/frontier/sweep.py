"""Every prompt's sweep from its cheapest plan to its best, in the order that an oracle with little budget would take.

This is the multiple-choice knapsack where mixtures of plans are allowed, its relaxation to a linear programme: each
prompt goes up the concave hull of its own (budget, score) points, and the steps of all prompts are taken in order of
score gained per budget spent. Source: Kellerer, Pferschy and Pisinger 2004, Knapsack Problems, section 11.2.

Shapes: `N` prompts, `K` plans, cheapest first, the last full. `scores` is [N, K], `budgets` [K]. `S` steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Choices = NDArray[np.intp]


@dataclass(frozen=True, slots=True)
class Sweep:
    """The steps of N prompts, most score per budget first; a prompt's own steps keep their order.

    Attributes:
        start: plan that each prompt starts at [N], the best of its cheapest.
        prompt: whose step it is [S].
        source: plan that the step leaves [S].
        target: plan that the step reaches [S].
    """

    start: Choices
    prompt: Choices
    source: Choices
    target: Choices

    def after(self, steps: int) -> Choices:
        """[N]: the plan of each prompt when the first `steps` steps are taken."""
        chosen = self.start.copy()
        chosen[self.prompt[:steps]] = self.target[:steps]
        return chosen


def sweep(scores: Floats, budgets: Floats) -> Sweep:
    """The sweep that these scores suggest. It ends at the cheapest plan with the prompt's best score.

    All prompts take their next step at once: the steepest way up from where they are, the longest of equally steep.
    """
    start = np.asarray(np.where(budgets == budgets[0], scores, -np.inf).argmax(axis=1))
    rows, at, last = np.arange(len(scores)), start, np.full(len(scores), np.inf)
    rounds: list[tuple[Choices, Choices, Choices, Floats]] = []
    while len(rows):
        slopes = _slopes(scores[rows], budgets, at)
        to = slopes.shape[1] - 1 - slopes[:, ::-1].argmax(axis=1)
        # Equal slopes can come out rising by a rounding error, which would let a prompt's second step go first.
        slope = np.minimum(slopes[np.arange(len(rows)), to], last)
        up = slope > 0
        rounds.append((rows[up], at[up], to[up], slope[up]))
        rows, at, last = rows[up], to[up], slope[up]
    prompt, source, target, slope = (np.concatenate(parts) for parts in zip(*rounds, strict=True))
    order = np.argsort(-slope, kind="stable")
    return Sweep(start, prompt[order], source[order], target[order])


def _slopes(scores: Floats, budgets: Floats, at: Choices) -> Floats:
    """[N, K]: score gained per budget spent from plan `at[i]` to each larger one; -inf to the others."""
    gained = scores - np.take_along_axis(scores, at[:, None], axis=1)
    spent = np.broadcast_to(budgets - budgets[at][:, None], gained.shape)
    slopes: Floats = np.divide(gained, spent, out=np.full(gained.shape, -np.inf), where=spent > 0)
    return slopes


def path(steps: Sweep, scores: Floats, budgets: Floats, counts: Floats | None = None) -> Floats:
    """[S + 1, 2]: mean budget and mean score of all prompts before the first step and after each.

    Args:
        steps: the sweep; it may have been made from other scores of the same prompts.
        scores: what the plans are worth [N, K].
        budgets: what they cost [K].
        counts: how often each prompt counts [N]; None for once.
    """
    weights = np.ones(len(scores)) if counts is None else counts
    share = weights / weights.sum()
    gained = scores[steps.prompt, steps.target] - scores[steps.prompt, steps.source]
    spent = budgets[steps.target] - budgets[steps.source]
    first = np.array([[budgets[0], share @ scores[np.arange(len(scores)), steps.start]]])
    rises = share[steps.prompt, None] * np.stack([spent, gained], axis=1)
    points: Floats = np.concatenate([first, rises]).cumsum(axis=0)
    return points
