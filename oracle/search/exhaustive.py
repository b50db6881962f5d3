"""Tries the menu from its cheapest plan up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from oracle.search.base import Search, Searcher, SearchSpace


@dataclass(frozen=True, slots=True)
class ExhaustiveSearch(Searcher):
    """All plans of the menu, cheapest first, until one is sufficient.

    Takes an evaluation for each plan up to the least sufficient one, at most K - 1, and proves what it finds. Works for
    any menu, whether or not a larger plan is always at least as good.
    """

    over_menu: ClassVar[bool] = True

    def search(self, space: SearchSpace) -> Search:
        for plan in space.shortened:
            if (yield plan):
                return


EXHAUSTIVE = ExhaustiveSearch()
