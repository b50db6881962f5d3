"""Removes whole layers from the full plan, one at a time, while the plan stays sufficient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from backbone.plan import LayerPlan
from oracle.search.base import Search, Searcher, SearchSpace


@dataclass(frozen=True, slots=True)
class RemovalSearch(Searcher):
    """Greedy search from the full plan downwards.

    At each step the plan tries to lose each of its layers after the probe, cheapest result first, and goes on from the
    first sufficient one. Results that run only a part of what was insufficient before are seldom sufficient: they are
    tried only where no other is, so that they cost little yet are not taken for granted. The search ends where the plan
    can lose no other layer.

    Source: SLEB (Song et al. 2024, arXiv 2402.09025, section 3) removes one block after another, each time the one
    whose loss shows least, once for a model; here it is done for each prompt, and its sufficiency decides.
    """

    over_menu: ClassVar[bool] = False

    def search(self, space: SearchSpace) -> Search:
        best: LayerPlan | None = space.full
        insufficient: list[LayerPlan] = []
        while best is not None:
            shorter = [best.without(attention={i}, mlp={i}) for i in space.removable if i in best.attention]
            unlikely = {plan for plan in shorter if any(plan <= failed for failed in insufficient)}
            best = None
            for plan in sorted(shorter, key=lambda plan: (plan in unlikely, space.rank(plan))):
                if (yield plan):
                    best = plan
                    break
                insufficient.append(plan)


GREEDY = RemovalSearch()
