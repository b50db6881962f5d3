"""What a searcher is, and the space of plans in which it looks for the least that is sufficient for one prompt.

To add one: a class that keeps this contract, one line that registers an object of it (in `SEARCHERS`, or in the entry
points of a package of one's own), and a test class that inherits `oracle.search.testing.SearcherConformance`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator
from dataclasses import dataclass
from typing import ClassVar

from backbone.errors import InputError
from backbone.plan import LayerPlan, PlanMenu, SublayerBytes

Search = Generator[LayerPlan, bool, None]
"""One search for one prompt: hands out plans to try, takes whether each was sufficient."""


class SearchError(InputError):
    """A search that cannot be: the message says what it was given and what would be right."""


@dataclass(frozen=True, slots=True)
class SearchSpace:
    """The plans that can be tried, and what they cost.

    Attributes:
        menu: K plans for searchers that choose; its `probe_depth` binds those that make plans of their own as well.
        sublayer_bytes: for each of the L layers the parameter bytes of its attention block and of its MLP block.

    Raises:
        SearchError: sizes for another number of layers than the menu's.
    """

    menu: PlanMenu
    sublayer_bytes: SublayerBytes

    def __post_init__(self) -> None:
        if len(self.sublayer_bytes) != self.menu.n_layers:
            raise SearchError(
                f"the menu is for {self.menu.n_layers} layers, but sizes were given for {len(self.sublayer_bytes)}"
            )

    @property
    def full(self) -> LayerPlan:
        """The full plan: sufficient by definition, so no search need ask for it."""
        return self.menu.plans[-1]

    @property
    def shortened(self) -> list[LayerPlan]:
        """The menu's other K - 1 plans, cheapest first."""
        return sorted(self.menu.plans[:-1], key=self.rank)

    @property
    def removable(self) -> range:
        """The layers that a plan may skip: those after the probe."""
        return range(self.menu.probe_depth, self.menu.n_layers)

    def budget(self, plan: LayerPlan) -> float:
        """Share of the decoder's parameter bytes that a plan runs, in (0, 1]."""
        return plan.budget(self.sublayer_bytes)

    def rank(self, plan: LayerPlan) -> tuple[float, str]:
        """Cheaper plans have lower ranks, and no two plans the same: of equal budgets the lesser text comes first."""
        return self.budget(plan), str(plan)

    def holds(self, plan: LayerPlan) -> bool:
        """Whether a plan can be asked for: for this model, running the probe layers, not full."""
        probe = range(self.menu.probe_depth)
        return (
            plan.n_layers == self.menu.n_layers
            and plan.attention.issuperset(probe)
            and plan.mlp.issuperset(probe)
            and not plan.is_full
        )


class Searcher(ABC):
    """Decides which plans are tried for a prompt, and in which order.

    `search` is called once for each prompt, and many of its searches may be under way at once, so that their requests
    can be answered together: a searcher keeps nothing of one search on itself. The same answers lead to the same
    requests. What it asks is all that a searcher decides; the driver (`oracle/search/driver.py`) counts evaluations,
    remembers answers and keeps the best plan.

    Attributes:
        over_menu: whether it asks for plans of the menu only; only then can its find be proved the least.
    """

    over_menu: ClassVar[bool]

    @abstractmethod
    def search(self, space: SearchSpace) -> Search:
        """Yield plans to try; receive whether each was sufficient.

        Every plan asked for must be one that `space.holds`, and of the menu if `over_menu`. To ask for a plan again
        costs nothing. The search must come to an end by itself, and may be ended before, after any request, when its
        evaluations are spent: so what promises most comes first.

        Raises:
            SearchError: before the first plan, if the space is of a kind that the searcher cannot search.
        """
