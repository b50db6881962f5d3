"""A menu of whatever shapes this model's prompts need: of many plans, those with which an oracle spends least.

Prompts may need different places left out, not only fewer layers. A wide pool (the plans of other methods, every gap,
pairs of the best gaps), each plan with its bridges, is judged first by divergence from the full model, which generates
nothing, and what is left of it by the prompts' own judges; `oracle.menus.p_median` picks the menu.

Shapes: `N` prompts, `P` plans, cheapest first, the last full.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np

from backbone.errors import PlanError
from backbone.families import model_fingerprint, sublayer_bytes
from backbone.healing.fit_bridges import bridges_of, fit_bridges
from backbone.healing.healing import Bridge, Healing
from backbone.left_padding import memory_budget
from backbone.plan import LayerPlan, PlanMenu
from oracle.judges import KL
from oracle.labels.reader import judged
from oracle.menus import MENUS
from oracle.menus.base import Advance, MenuTask, TaskLabels
from oracle.menus.p_median import Floats, best_plans, substituted

POOL, POOL_PLANS = ("exits", "gaps", "evenly"), 64
"""The methods whose plans are tried, and how many of each, at most."""

PAIRS = 24
"""Pairs of gaps that are tried, at most."""

DIVERGED = (0.02, 0.1, 0.3)
"""Shares of the full model's mean score by divergence that an oracle may lose, beside the task's own larger losses: for
each of them the prompts' own judges get to see twice as many plans as the menu has."""

TRUST = 0.5
"""How much of what a score says beyond its plan's mean the choice takes for more than luck. On prompts held out,
menus chosen with half of it have as good an oracle and a far better static mixture (docs/log.md)."""

SUMS_BYTES = 2**30
"""Memory for the sums that bridges are fitted from, on a GPU a quarter of what is free there; with more gaps the
prompts are run several times."""


def covering(task: MenuTask, advance: Advance) -> list[LayerPlan]:
    """The K - 1 plans of a pool with which an oracle spends least at a few losses.

    Raises:
        PlanError: a task without labels, or without prompts to fit bridges on.
    """
    if task.labels is None:
        raise PlanError("the menu 'covering' looks at scores, and this task has no labels")
    if not task.labels.others:
        raise PlanError(
            f"the menu 'covering' fits bridges on prompts that it does not look at, and looks at all "
            f"{len(task.prompts)}: lower menu.prompts to half of the split 'adapt', or give that a larger share"
        )
    pool = _Pool(task, task.labels, advance)
    found = pool.measured(pool_plans(task), KL)
    if pairs := two_gaps(found, task):
        found = found.joined(pool.measured(pairs, KL))
    left = {plan for loss in _diverged(task) for plan in found.good(2 * task.n_plans - 1, loss)}
    return pool.measured(sorted(left, key=str), None).best(task.n_plans, task.losses)


def most_measured(task: MenuTask) -> int:
    """Plans that a search measures, at most."""
    return len(pool_plans(task)) + PAIRS + len(_diverged(task)) * 2 * (task.n_plans - 1)


def _diverged(task: MenuTask) -> set[float]:
    return {*DIVERGED, *(loss for loss in task.losses if loss > max(DIVERGED))}


def pool_plans(task: MenuTask) -> list[LayerPlan]:
    """The plans of the pool's methods that run no less than the cheapest budget."""
    wide, sizes = replace(task, n_plans=POOL_PLANS + 1), sublayer_bytes(task.model)
    plans = {plan for method in POOL for plan in MENUS[method](wide, lambda: None) if not plan.is_full}
    return sorted((plan for plan in plans if plan.budget(sizes) >= task.cheapest_budget), key=str)


@dataclass(frozen=True, slots=True)
class Measured:
    """Plans with what they cost and score.

    Attributes:
        plans: P plans.
        budgets: of each, its bridges counted [P].
        scores: of the prompts [N, P].
    """

    plans: list[LayerPlan]
    budgets: Floats
    scores: Floats

    def joined(self, other: Measured) -> Measured:
        """Both, cheapest first; `other` measured the same prompts, and its full plan is this one's."""
        plans = [*other.plans[:-1], *self.plans]
        budgets = np.concatenate([other.budgets[:-1], self.budgets])
        scores = np.concatenate([other.scores[:, :-1], self.scores], axis=1)
        order = sorted(range(len(plans)), key=lambda i: (plans[i].is_full, budgets[i], str(plans[i])))
        return Measured([plans[i] for i in order], budgets[order], scores[:, order])

    def best(self, count: int, losses: Sequence[float]) -> list[LayerPlan]:
        """The `count` - 1 shortened plans with which an oracle spends least; see `p_median.best_plans`."""
        return self._shortened(best_plans(self._trusted, self.budgets, count, losses))

    def good(self, count: int, loss: float) -> list[LayerPlan]:
        """A good choice of as many at one loss, found in a moment; see `p_median.substituted`."""
        return self._shortened(substituted(self._trusted, self.budgets, count, [loss]))

    @property
    def _trusted(self) -> Floats:
        """Scores of the prompts that a judge could read, drawn towards the mean of each plan; see `TRUST`.

        Some of a wide pool's poor plans are right by luck on just the prompts that are looked at.
        """
        _, known = judged(self.scores)
        means: Floats = known.mean(axis=0)
        return means + TRUST * (known - means)

    def _shortened(self, places: Sequence[int]) -> list[LayerPlan]:
        return [self.plans[place] for place in places if not self.plans[place].is_full]


class _Pool:
    """Measures plans with bridges, each of which is fitted once, on the full model's states."""

    def __init__(self, task: MenuTask, labels: TaskLabels, advance: Advance) -> None:
        self._task, self._labels, self._advance = task, labels, advance
        self._fingerprint = model_fingerprint(task.model)
        self._bridges: dict[range, Bridge] = {}

    def measured(self, plans: Sequence[LayerPlan], judge: str | None) -> Measured:
        """The plans and the full one; the prompts judged as they say, or by `judge`."""
        model, made = self._task.model, 0
        self._fit({gap for plan in plans for gap in plan.gaps} - self._bridges.keys())
        bridges = {plan: {gap.start: self._bridges[gap] for gap in plan.gaps} for plan in plans}
        healing = Healing(self._fingerprint, bridges)

        def advance(labels: int) -> None:
            nonlocal made
            before, made = made, made + labels
            for _ in range(made // len(self._labels.prompts) - before // len(self._labels.prompts)):
                self._advance()

        menu = PlanMenu.build(plans, sublayer_bytes(model), self._task.probe_depth)
        menu = menu.keeping({str(plan): healing.cost(model, plan) for plan in plans})
        scores = self._labels.scores(menu.plans, healing, judge, advance)
        return Measured(list(menu.plans), np.array(menu.budgets), scores)

    def _fit(self, gaps: set[range]) -> None:
        if not gaps:
            return
        ordered, sequences = sorted(gaps, key=lambda gap: (gap.start, gap.stop)), self._labels.sequences()
        size = self._task.model.config.get_text_config().hidden_size + 1
        together = max(1, memory_budget(self._task.model.device, SUMS_BYTES, 0.25) // (4 * 8 * size * size))
        for start in range(0, len(ordered), together):
            plans = {gap: LayerPlan.skipping(self._task.n_layers, gap) for gap in ordered[start : start + together]}
            fitted = bridges_of(fit_bridges(self._task.model, sequences, list(plans.values())))
            self._bridges |= {gap: fitted[plan][gap.start] for gap, plan in plans.items()}


def two_gaps(found: Measured, task: MenuTask) -> list[LayerPlan]:
    """Pairs of gaps that are apart, those that diverge least of each total length: at most `PAIRS`."""
    sizes = sublayer_bytes(task.model)
    diverged = -np.log(np.maximum(judged(found.scores)[1].mean(axis=0), 1e-9))
    singles = [len(plan.gaps) == 1 and plan.skipped_attention == plan.skipped_mlp for plan in found.plans]
    gaps = {plan.gaps[0]: nats for plan, nats, one in zip(found.plans, diverged, singles, strict=True) if one}
    by_length: dict[int, list[tuple[float, str, LayerPlan]]] = defaultdict(list)
    for first, second in combinations(sorted(gaps, key=lambda gap: gap.start), 2):
        plan = LayerPlan.skipping(task.n_layers, [*first, *second])
        if first.stop < second.start and plan.budget(sizes) >= task.cheapest_budget and plan not in found.plans:
            by_length[len(first) + len(second)].append((gaps[first] + gaps[second], str(plan), plan))
    each = max(1, PAIRS // max(len(by_length), 1))
    return [plan for pairs in by_length.values() for _, _, plan in sorted(pairs)[:each]][:PAIRS]
