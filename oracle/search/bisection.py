"""Halves a nested menu until the least sufficient plan is left, then checks what it took for granted."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from backbone.plan import LayerPlan
from oracle.search.base import Search, Searcher, SearchError, SearchSpace


@dataclass(frozen=True, slots=True)
class BisectionSearch(Searcher):
    """Binary search over a menu in which each plan runs all that the one before it runs.

    If sufficiency grows with the plan, the first ceil(log2 K) evaluations find the least sufficient plan. It need not:
    so the cheaper plans are then tried as well, from the next cheaper one down, while the budget lasts. A budget of
    K - 1 always proves what is found, and mends it where a plan was sufficient below one that was not.
    """

    over_menu: ClassVar[bool] = True

    def search(self, space: SearchSpace) -> Search:
        plans = space.shortened
        _check_nested([*plans, space.full])
        low, high = 0, len(plans)  # the plan at `high` is sufficient; the full one, at the end, always is
        while low < high:
            middle = (low + high) // 2
            if (yield plans[middle]):
                high = middle
            else:
                low = middle + 1
        for plan in reversed(plans[:high]):  # noqa: UP028 - what `yield from` asks of a list cannot be answered
            yield plan


def _check_nested(plans: list[LayerPlan]) -> None:
    for small, large in pairwise(plans):
        if not small <= large:
            raise SearchError(
                f"bisection needs a menu in which each plan runs all that the one before it runs, but plan {large} "
                f"does not run all of {small}: take the searcher 'mcts', or a menu of early exits or of greedy removals"
            )


BISECTION = BisectionSearch()
