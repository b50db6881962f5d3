"""Which method's plans are best when all prompts run them? Quality against budget, measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from oracle.frontier.frontier import upper_hull
from oracle.labels.labeller import Labeller
from oracle.labels.reader import score_matrix
from oracle.menus import build_menu
from oracle.menus.base import MenuTask
from oracle.prompts import Prompt


@dataclass(frozen=True, slots=True)
class StaticPlan:
    """One plan that all prompts run.

    Attributes:
        method: the menu that it comes from.
        plan: its text.
        budget: share of the decoder's parameter bytes that it runs.
        quality: mean score.
        quality_ratio: to the full model's.
    """

    method: str
    plan: str
    budget: float
    quality: float
    quality_ratio: float


def compare(
    methods: Sequence[str],
    task: MenuTask,
    labeller: Labeller,
    prompts: Sequence[Prompt],
    done: Callable[[str], None] = lambda method: None,
) -> list[StaticPlan]:
    """Make the menu of each method and label `prompts`, which should not be the task's own, under its plans.

    Returns:
        The plans of all methods, method by method, cheapest first. `done` is called after each.
    """
    found = []
    for method in methods:
        menu = build_menu(method, task)
        labeller.label(prompts, menu)
        qualities = score_matrix(labeller.read(prompts, menu)).mean(axis=0)
        for plan, budget, quality in zip(menu.plans, menu.budgets, qualities.tolist(), strict=True):
            found.append(StaticPlan(method, str(plan), budget, quality, quality / max(qualities[-1], 1e-9)))
        done(method)
    return found


def quality_at(plans: Sequence[StaticPlan], budget: float) -> float:
    """The best quality ratio of a mixture of one method's plans at a mean budget; that of the cheapest below it."""
    hull = upper_hull([(plan.budget, plan.quality_ratio) for plan in plans])
    budgets, qualities = zip(*hull, strict=True)
    return float(np.interp(budget, budgets, qualities))
