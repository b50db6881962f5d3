"""Drives searches: many prompts in rounds, each with a budget of evaluations; says what each found, and how surely."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from backbone.plan import LayerPlan, PlanMenu
from oracle.labels.labeller import Labeller
from oracle.prompts import Prompt
from oracle.search.base import Searcher, SearchError, SearchSpace

P = TypeVar("P")

MOST_REPEATS = 10_000
"""Requests in a row for plans already known after which a search is taken to be endless."""


@dataclass(frozen=True, slots=True)
class Found:
    """The end of one search.

    Attributes:
        plan: the cheapest plan known to be sufficient, by parameter bytes; the full one where no other is known.
        proved: that no cheaper plan of the searched space is sufficient, since each was tried; else the best found.
        evaluations: distinct plans tried. The full plan is sufficient by definition and is not among them.
    """

    plan: LayerPlan
    proved: bool
    evaluations: int


def run_search(searcher: Searcher, space: SearchSpace, evaluate: Callable[[LayerPlan], bool], budget: int) -> Found:
    """Search for one prompt. `evaluate` says whether a plan is sufficient for it; see `run_searches`."""
    return run_searches(searcher, space, [None], lambda pairs: [evaluate(plan) for _, plan in pairs], budget)[0]


def run_searches(
    searcher: Searcher,
    space: SearchSpace,
    prompts: Sequence[P],
    evaluate: Callable[[list[tuple[P, LayerPlan]]], Sequence[bool]],
    budget: int,
) -> list[Found]:
    """Search for N prompts at once, in rounds; the same as one after another, with fewer and larger batches.

    Args:
        searcher: decides what is asked.
        space: the plans, the same for all prompts.
        prompts: anything that `evaluate` understands.
        evaluate: called once a round with the next request of every search that is not over, (prompt, plan) in the
            order of the prompts; gives whether each plan is sufficient for its prompt.
        budget: evaluations for each prompt, at most.

    Returns:
        N finds, in the order of the prompts.

    Raises:
        SearchError: a negative budget, a space that the searcher cannot search, a request outside its space, or a
            search that does not end.
    """
    if budget < 0:
        raise SearchError(f"a search needs a budget of 0 or more evaluations, got {budget}")
    runs = [_Run(searcher, space, budget) for _ in prompts]
    while waiting := [
        (run, prompt, run.request) for run, prompt in zip(runs, prompts, strict=True) if run.request is not None
    ]:
        answers = evaluate([(prompt, plan) for _, prompt, plan in waiting])
        for (run, _, plan), sufficient in zip(waiting, answers, strict=True):
            run.tell(plan, bool(sufficient))
    return [run.found() for run in runs]


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


class _Run:
    """One search: the plan it waits for (`request`, None at its end), and all that it was told."""

    def __init__(self, searcher: Searcher, space: SearchSpace, budget: int) -> None:
        self._searcher, self._space, self._budget = searcher, space, budget
        self._told: dict[LayerPlan, bool] = {space.full: True}
        self._search = searcher.search(space)
        self.request = self._next_request(None)

    def tell(self, plan: LayerPlan, sufficient: bool) -> None:
        self._told[plan] = sufficient
        self.request = self._next_request(sufficient)

    def found(self) -> Found:
        best = min((plan for plan, sufficient in self._told.items() if sufficient), key=self._space.rank)
        return Found(best, self._is_proved(best), self._evaluations)

    @property
    def _evaluations(self) -> int:
        return len(self._told) - 1  # the full plan was told without one

    def _is_proved(self, best: LayerPlan) -> bool:
        """The one place where a proof is claimed.

        A cheaper plan that was tried was not sufficient, or it would be the best. Plans that a searcher makes by itself
        are too many to try them all.
        """
        cheaper = [plan for plan in self._space.shortened if self._space.rank(plan) < self._space.rank(best)]
        return self._searcher.over_menu and all(plan in self._told for plan in cheaper)

    def _next_request(self, answer: bool | None) -> LayerPlan | None:
        """Goes on, with what is known, to the next plan that must be evaluated; None if there is none, or no budget."""
        try:
            plan = self._first_unknown(next(self._search) if answer is None else self._search.send(answer))
        except StopIteration:
            return None
        self._check(plan)
        if self._evaluations < self._budget:
            return plan
        self._search.close()
        return None

    def _first_unknown(self, plan: LayerPlan) -> LayerPlan:
        for _ in range(MOST_REPEATS):
            if plan not in self._told:
                return plan
            plan = self._search.send(self._told[plan])
        name = type(self._searcher).__name__
        raise SearchError(f"{name} does not end: it asked {MOST_REPEATS} times in a row for plans that it knows")

    def _check(self, plan: LayerPlan) -> None:
        name = type(self._searcher).__name__
        if not self._space.holds(plan):
            raise SearchError(
                f"{name} asked for plan {plan}, but plans of this space have {self._space.menu.n_layers} layers "
                f"and run layers 0 to {self._space.menu.probe_depth - 1}"
            )
        if self._searcher.over_menu and plan not in self._space.menu.plans:
            raise SearchError(f"{name} says that it searches the menu, but asked for plan {plan}, which is not in it")
