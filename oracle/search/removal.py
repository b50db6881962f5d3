"""Removes whole layers from the full plan, one at a time, while the plan stays sufficient."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from backbone.plan import LayerPlan
from oracle.search.base import Search, Searcher, SearchError, SearchSpace


@dataclass(frozen=True, slots=True)
class RemovalSearch(Searcher):
    """Beam search from the full plan downwards; of width 1 it is greedy.

    At each step every plan of the beam tries to lose each of its layers after the probe, cheapest result first, and the
    first `width` sufficient results are the next beam. Results that run only a part of what was insufficient before are
    seldom sufficient: they are tried only where no other is, so that they cost little yet are not taken for granted.
    The search ends where no plan of the beam can lose another layer.

    Source: SLEB (Song et al. 2024, arXiv 2402.09025, section 3) removes one block after another, each time the one
    whose loss shows least, once for a model; here it is done for each prompt, and its sufficiency decides.

    Args:
        width: plans kept at each step.

    Raises:
        SearchError: a width below 1.
    """

    width: int = 1
    over_menu: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.width < 1:
            raise SearchError(f"a beam must keep at least 1 plan, got {self.width}")

    def search(self, space: SearchSpace) -> Search:
        beam, insufficient = [space.full], list[LayerPlan]()
        while beam:
            likely, unlikely = _split(_one_layer_less(beam, space), insufficient)
            beam = yield from self._next_beam(likely, insufficient)
            if not beam:
                beam = yield from self._next_beam(unlikely, insufficient)

    def _next_beam(
        self, plans: Sequence[LayerPlan], insufficient: list[LayerPlan]
    ) -> Generator[LayerPlan, bool, list[LayerPlan]]:
        """Asks for plans in their order until `width` of them are sufficient; adds the others to `insufficient`."""
        beam: list[LayerPlan] = []
        for plan in plans:
            if len(beam) == self.width:
                break
            sufficient = yield plan
            (beam if sufficient else insufficient).append(plan)
        return beam


def _one_layer_less(beam: Sequence[LayerPlan], space: SearchSpace) -> list[LayerPlan]:
    """The distinct plans that are a plan of the beam less one layer, cheapest first."""
    shorter = {plan.without(attention={i}, mlp={i}) for plan in beam for i in space.removable if i in plan.attention}
    return sorted(shorter, key=space.rank)


def _split(plans: Sequence[LayerPlan], insufficient: Sequence[LayerPlan]) -> tuple[list[LayerPlan], list[LayerPlan]]:
    """Plans that are no part of an insufficient one, and those that are; each in the order given."""
    likely: list[LayerPlan] = []
    unlikely: list[LayerPlan] = []
    for plan in plans:
        (unlikely if any(plan <= failed for failed in insufficient) else likely).append(plan)
    return likely, unlikely


GREEDY = RemovalSearch(width=1)
BEAM = RemovalSearch(width=3)
