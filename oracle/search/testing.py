"""The conformance suite of searchers: a test class that inherits it proves that its searcher keeps the contract.

    class TestMine(SearcherConformance):
        def make(self):
            return MySearch()

pytest then finds the tests below in `TestMine`.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import suppress

from backbone.plan import LayerPlan, PlanMenu
from oracle.search.base import Searcher, SearchSpace
from oracle.search.driver import Found, run_search, run_searches

Sufficiency = Callable[[LayerPlan], bool]

BUDGETS = (0, 1, 3, 100)
SEEDS = range(21)


def monotone_sufficiency(space: SearchSpace, seed: int) -> Sufficiency:
    """Sufficient is what runs all of at least one of three random plans; so whatever runs more is sufficient too."""
    draw = random.Random(seed)
    skipped = [[i for i in space.removable if draw.random() < 0.5] for _ in range(3)]
    needed = [LayerPlan.skipping(space.menu.n_layers, layers) for layers in skipped]
    return lambda plan: any(least <= plan for least in needed)


def arbitrary_sufficiency(space: SearchSpace, seed: int) -> Sufficiency:
    """Each plan for itself is sufficient in four of ten cases, the full one always."""
    return lambda plan: plan.is_full or random.Random(f"{seed} {plan}").random() < 0.4


def least_of_menu(space: SearchSpace, sufficient: Sufficiency) -> LayerPlan:
    """The menu's least sufficient plan, by trying all."""
    return min(filter(sufficient, space.menu.plans), key=lambda plan: (plan.budget(space.sublayer_bytes), str(plan)))


def _noting(sufficient: Sufficiency) -> tuple[Sufficiency, list[LayerPlan]]:
    """The same sufficiency, and the list of plans it is asked for."""
    tried: list[LayerPlan] = []

    def noting(plan: LayerPlan) -> bool:
        tried.append(plan)
        return sufficient(plan)

    return noting, tried


class SearcherConformance:
    """Inherit, and override `make`, and `space` for a searcher that needs another one; pytest finds the tests."""

    def make(self) -> Searcher:
        """A new searcher."""
        raise NotImplementedError

    def space(self) -> SearchSpace:
        """A nested menu of six plans for a model of eight layers, the first two the probe; some layers weigh more."""
        sizes = [(2, 4), (2, 4), (2, 4), (3, 3), (1, 5), (2, 4), (4, 8), (3, 6)]
        gone: list[set[int]] = [{4}, {4, 6}, {3, 4, 6}, {3, 4, 5, 6}, {2, 3, 4, 5, 6}]
        return SearchSpace(PlanMenu.build([LayerPlan.skipping(8, layers) for layers in gone], sizes, 2), sizes)

    def tables(self) -> list[Sufficiency]:
        """For each seed a monotone sufficiency and an arbitrary one, and one in which the full plan alone suffices."""
        kinds = (monotone_sufficiency, arbitrary_sufficiency)
        return [kind(self.space(), seed) for kind in kinds for seed in SEEDS] + [lambda plan: plan.is_full]

    def requests(self, sufficient: Sufficiency, limit: int = 1000) -> list[LayerPlan]:
        """All that a search asks, one after another, when nothing is remembered for it; at most `limit`."""
        search = self.make().search(self.space())
        asked: list[LayerPlan] = []
        with suppress(StopIteration):
            asked.append(next(search))
            while len(asked) < limit:
                asked.append(search.send(sufficient(asked[-1])))
        return asked

    def find(self, sufficient: Sufficiency, budget: int) -> Found:
        return run_search(self.make(), self.space(), sufficient, budget)

    def test_asks_only_for_plans_of_the_space(self) -> None:
        space, over_menu = self.space(), self.make().over_menu
        for sufficient in self.tables():
            for plan in self.requests(sufficient):
                assert plan.n_layers == space.menu.n_layers
                assert set(range(space.menu.probe_depth)) <= plan.attention & plan.mlp
                assert not plan.is_full
                assert not over_menu or plan in space.menu.plans

    def test_comes_to_an_end(self) -> None:
        for sufficient in self.tables():
            assert len(self.requests(sufficient, limit=1000)) < 1000

    def test_never_exceeds_the_budget(self) -> None:
        for sufficient in self.tables():
            for budget in BUDGETS:
                noting, tried = _noting(sufficient)
                found = self.find(noting, budget)
                assert len(tried) == len(set(tried)) == found.evaluations <= budget

    def test_finds_the_cheapest_of_what_was_sufficient(self) -> None:
        space = self.space()
        for sufficient in self.tables():
            asked = self.requests(sufficient)
            for budget in BUDGETS:
                found = self.find(sufficient, budget)
                known = [space.full, *filter(sufficient, asked[: found.evaluations])]
                assert found.plan.is_full or sufficient(found.plan)
                assert space.budget(found.plan) <= min(map(space.budget, known))

    def test_without_evaluations_the_full_plan_is_found(self) -> None:
        for sufficient in self.tables():
            assert self.find(sufficient, 0).plan.is_full

    def test_where_nothing_else_is_sufficient_the_full_plan_is_found(self) -> None:
        for budget in BUDGETS:
            assert self.find(lambda plan: False, budget).plan.is_full

    def test_where_all_is_sufficient_something_is_saved(self) -> None:
        assert not self.find(lambda plan: True, 100).plan.is_full

    def test_the_same_answers_lead_to_the_same_requests(self) -> None:
        for sufficient in self.tables():
            assert self.requests(sufficient) == self.requests(sufficient)

    def test_many_prompts_at_once_find_what_each_finds_alone(self) -> None:
        searcher, space, tables = self.make(), self.space(), self.tables()
        for budget in BUDGETS:
            together = run_searches(
                searcher, space, tables, lambda pairs: [sufficient(plan) for sufficient, plan in pairs], budget
            )
            assert together == [self.find(sufficient, budget) for sufficient in tables]
            assert together == [run_search(searcher, space, sufficient, budget) for sufficient in tables]

    def test_a_proof_is_never_wrong(self) -> None:
        for sufficient in self.tables():
            for budget in BUDGETS:
                found = self.find(sufficient, budget)
                assert self.make().over_menu or not found.proved
                assert not found.proved or found.plan == least_of_menu(self.space(), sufficient)
