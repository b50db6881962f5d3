"""Searches on a model: what they ask is labelled, many prompts a round, and stays in the store."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

from backbone.plan import LayerPlan, PlanMenu
from oracle.labels.labeller import Labeller
from oracle.prompts import Prompt
from oracle.search.base import Searcher, SearchSpace
from oracle.search.driver import Found, run_searches


def search_prompts(
    searcher: Searcher,
    space: SearchSpace,
    labeller: Labeller,
    prompts: Sequence[Prompt],
    budget: int,
    tolerance: float = 0.0,
    advance: Callable[[int], None] = lambda done: None,
) -> list[Found]:
    """The least sufficient plan of each of N prompts, as far as `budget` evaluations a prompt find it.

    A plan is sufficient if its score is at least the full plan's less `tolerance`; one whose judge failed is not. The
    labels that this takes, the full plan's among them, are kept in the labeller's store, and found there again.
    `advance` is called with the number of plans that a round tried.

    Raises:
        SearchError: see `run_searches`.
    """
    full = space.full
    labeller.label(prompts, PlanMenu((full,), (1.0,), space.menu.probe_depth))
    needed = dict(zip(prompts, labeller.scores(prompts, full), strict=True))

    def evaluate(pairs: list[tuple[Prompt, LayerPlan]]) -> list[bool]:
        wanted: dict[LayerPlan, list[Prompt]] = defaultdict(list)
        for prompt, plan in pairs:
            wanted[plan].append(prompt)
        labeller.label_some(wanted, full)
        sufficient: dict[tuple[Prompt, LayerPlan], bool] = {}
        for plan, some in wanted.items():
            for prompt, score in zip(some, labeller.scores(some, plan), strict=True):
                sufficient[prompt, plan] = score >= needed[prompt] - tolerance
        advance(len(pairs))
        return [sufficient[pair] for pair in pairs]

    return run_searches(searcher, space, prompts, evaluate, budget)
