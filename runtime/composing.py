"""Which prompts of a large set run together: batches by plan and length, by what their passes cost.

A batch of one plan reads only the weights of its layers, a mixed one those of its deepest row; prompts of like length
save padding. So full batches of one plan come first, and the rest runs alone or with others, as is faster.

Shapes: `N` prompts, `L` layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from backbone.plan import LayerPlan
from runtime.step_costs import StepCosts

Batch = list[int]
"""Places of prompts that run together."""


@dataclass(frozen=True, slots=True)
class Composer:
    """Composes batches of N prompts.

    Attributes:
        costs: of the model's passes; estimated ones serve, since only their ratios count.
        plans: of the prompts.
        lengths: tokens of the prompts.
        new_tokens: that each prompt is answered with, at most.
    """

    costs: StepCosts
    plans: Sequence[LayerPlan]
    lengths: Sequence[int]
    new_tokens: int

    def composed(self, batch_size: int) -> list[Batch]:
        """All prompts in batches of at most `batch_size`: of three ways the one that takes the least time.

        The deepest plans and the longest prompts come first, so that too little memory shows at once. Within a batch
        rows lie by depth, so that those that run a layer are neighbours.
        """
        by_plan: dict[LayerPlan, Batch] = {}
        for place in self._deepest_first(range(len(self.plans))):
            by_plan.setdefault(self.plans[place], []).append(place)
        full: list[Batch] = []
        left: list[Batch] = []
        for places in by_plan.values():
            parts = _parts(places, batch_size)
            (full if len(parts[-1]) == batch_size else left).append(parts.pop())
            full += parts
        by_length = sorted(range(len(self.plans)), key=lambda place: -self.lengths[place])
        ways = (
            full + self._merged(left, batch_size),
            full + _parts([place for places in left for place in places], batch_size),
            _parts(by_length, batch_size),
        )
        best = min(ways, key=lambda way: sum(map(self.ms, way)))
        ordered = [self._deepest_first(batch) for batch in best]
        return sorted(ordered, key=lambda batch: self._depth_and_length(batch[0]))

    def ms(self, batch: Sequence[int]) -> float:
        """What a batch takes: one pass over its padded prompts and one for each further token, each layer over the rows
        that run it."""
        plans = [self.plans[place] for place in batch]
        runs = [[(i in plan.attention) + (i in plan.mlp) for i in range(plan.n_layers)] for plan in plans]
        rows, longest = np.sum(runs, axis=0) / 2, max(self.lengths[place] for place in batch)
        steps = (self.new_tokens - 1) * self.costs.mixed_ms(len(batch), rows)
        return self.costs.mixed_ms(len(batch) * longest, rows * longest) + steps

    def _merged(self, batches: Iterable[Batch], batch_size: int) -> list[Batch]:
        """Batches, of which pairs are put together as long as that saves time, the pair that saves most first."""
        found = {tuple(batch): self.ms(batch) for batch in batches}
        while True:
            pairs = [(a, b, (*a, *b)) for a, b in combinations(found, 2) if len(a) + len(b) <= batch_size]
            saved = {pair: found[pair[0]] + found[pair[1]] - self.ms(pair[2]) for pair in pairs}
            best = max(saved, key=lambda pair: saved[pair], default=None)
            if best is None or saved[best] <= 0:
                return [list(batch) for batch in found]
            first, second, both = best
            found[both] = found.pop(first) + found.pop(second) - saved[best]

    def _deepest_first(self, places: Iterable[int]) -> Batch:
        return sorted(places, key=self._depth_and_length)

    def _depth_and_length(self, place: int) -> tuple[float, str, int]:
        return -self.plans[place].layers, str(self.plans[place]), -self.lengths[place]


def _parts(places: Batch, size: int) -> list[Batch]:
    return [places[start : start + size] for start in range(0, len(places), size)]
