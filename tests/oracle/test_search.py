import math
from itertools import chain, combinations
from statistics import mean

import pytest
from tiny import tiny_model

from backbone.families import sublayer_bytes
from backbone.plan import LayerPlan, PlanMenu
from oracle.decoding import Decoding
from oracle.frontier.frontier import least_sufficient, sufficient_plans
from oracle.labels.labeller import Labeller
from oracle.labels.reader import score_matrix
from oracle.labels.store import LabelStore
from oracle.prompts import Prompt
from oracle.search import SEARCHERS
from oracle.search.base import Searcher, SearchError, SearchSpace
from oracle.search.driver import Found, run_search, run_searches, search_prompts
from oracle.search.searchers import BisectionSearch, MctsSearch, RemovalSearch
from oracle.search.testing import SEEDS, SearcherConformance, arbitrary_sufficiency, least_of_menu, monotone_sufficiency


class ExhaustiveSearch(Searcher):
    """All plans of the menu, cheapest first, until one is sufficient: what other searchers are held against."""

    over_menu = True

    def search(self, space):
        for plan in space.shortened:
            if (yield plan):
                return


def suite_of(searcher: type[Searcher]) -> type[SearcherConformance]:
    return type(f"Test{searcher.__name__}", (SearcherConformance,), {"make": lambda self: searcher()})


TestBisection, TestRemoval, TestMcts = map(suite_of, (BisectionSearch, RemovalSearch, MctsSearch))

NESTED = SearcherConformance().space()
UNNESTED = SearchSpace(
    PlanMenu.build([LayerPlan.evenly(8, n, probe_depth=2) for n in range(3, 8)], NESTED.sublayer_bytes, 2),
    NESTED.sublayer_bytes,
)
TABLES = SearcherConformance().tables()


def exits(k: int) -> SearchSpace:
    """A nested menu of k early exits."""
    sizes = [(1, 2)] * k
    return SearchSpace(PlanMenu.build([LayerPlan.exiting(k, n) for n in range(1, k)], sizes, 1), sizes)


def least_of_all(space: SearchSpace, sufficient) -> float:
    """The least budget of all plans of whole layers, by trying all."""
    skips = chain.from_iterable(combinations(space.removable, n) for n in range(len(space.removable) + 1))
    return min(map(space.budget, filter(sufficient, (LayerPlan.skipping(space.menu.n_layers, s) for s in skips))))


def test_the_registered_searchers_search() -> None:
    for searcher in SEARCHERS.values():
        assert not run_search(searcher, NESTED, lambda plan: True, 20).plan.is_full


@pytest.mark.parametrize("searcher", [ExhaustiveSearch(), BisectionSearch()])
def test_over_a_menu_an_ample_budget_always_proves_the_least(searcher) -> None:
    budget = len(NESTED.menu) - 1
    for sufficient in TABLES:
        found = run_search(searcher, NESTED, sufficient, budget)
        assert (found.plan, found.proved) == (least_of_menu(NESTED, sufficient), True)


def test_exhaustive_needs_no_nested_menu_and_stops_at_the_first() -> None:
    for seed in SEEDS:
        sufficient = arbitrary_sufficiency(UNNESTED, seed)
        least = least_of_menu(UNNESTED, sufficient)
        tried = min(UNNESTED.menu.plans.index(least) + 1, len(UNNESTED.menu) - 1)
        assert run_search(ExhaustiveSearch(), UNNESTED, sufficient, 100) == Found(least, True, tried)


@pytest.mark.parametrize("k", [1, 2, 3, 7, 8, 9, 24])
def test_bisection_finds_the_least_in_logarithmic_time_where_sufficiency_grows(k) -> None:
    space = exits(k)
    for least in space.menu.plans:
        assert run_search(BisectionSearch(), space, least.__le__, math.ceil(math.log2(k))).plan == least


def test_bisection_proves_only_what_it_verified() -> None:
    only_full = LayerPlan.full(8).__le__
    assert run_search(BisectionSearch(), exits(8), only_full, 3) == Found(LayerPlan.full(8), False, 3)
    assert run_search(BisectionSearch(), exits(8), only_full, 7) == Found(LayerPlan.full(8), True, 7)


def test_verification_mends_what_is_not_monotone() -> None:
    space, plans = exits(8), exits(8).menu.plans
    sufficient = {plans[1], plans[6], plans[7]}.__contains__
    assert run_search(BisectionSearch(), space, sufficient, 3).plan == plans[6]
    assert run_search(BisectionSearch(), space, sufficient, 100) == Found(plans[1], True, 7)


def test_removal_ends_where_no_further_layer_can_go() -> None:
    for sufficient in TABLES:
        plan = run_search(RemovalSearch(), NESTED, sufficient, 1000).plan
        for layer in plan.attention & set(NESTED.removable):
            assert not sufficient(plan.without(attention={layer}, mlp={layer}))


def test_greedy_tries_each_layer_once_where_sufficiency_grows() -> None:
    for seed in SEEDS:
        sufficient = monotone_sufficiency(NESTED, seed)
        early, late = (run_search(RemovalSearch(), NESTED, sufficient, n) for n in (len(NESTED.removable), 1000))
        assert early.plan == late.plan


def test_tree_search_tries_everything_in_the_end() -> None:
    for sufficient in TABLES:
        found = run_search(MctsSearch(), NESTED, sufficient, 1000)
        assert found.evaluations == 2 ** len(NESTED.removable) - 1
        assert NESTED.budget(found.plan) == least_of_all(NESTED, sufficient)


def test_tree_search_depends_on_its_seed() -> None:
    assert len({next(MctsSearch(seed).search(NESTED)) for seed in range(9)}) > 1


def test_tree_search_goes_where_it_was_rewarded() -> None:
    """Half the layers are free to go. Where the confidence term drowns the rewards, fewer of them are found."""
    free = set(range(10, 20))

    def layers(exploration):
        searches = [(MctsSearch(seed, exploration), exits(20)) for seed in SEEDS]
        return mean(run_search(*one, lambda plan: plan.skipped_layers <= free, 60).plan.layers for one in searches)

    assert layers(MctsSearch().exploration) < layers(100.0) - 1


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(SearchError, match="exploration must be 0 or more, got -1"):
        MctsSearch(exploration=-1)
    with pytest.raises(SearchError, match="bisection needs a menu in which each plan runs all that the one before"):
        run_search(BisectionSearch(), UNNESTED, lambda plan: True, 5)
    with pytest.raises(SearchError, match="a budget of 0 or more evaluations, got -1"):
        run_search(ExhaustiveSearch(), NESTED, lambda plan: True, -1)
    with pytest.raises(SearchError, match="the menu is for 8 layers, but sizes were given for 3"):
        SearchSpace(NESTED.menu, [(1, 2)] * 3)


def test_a_round_asks_once_for_every_search_that_is_not_over() -> None:
    plans = exits(4).menu.plans
    rounds = []

    def evaluate(pairs):
        rounds.append([(least, plans.index(plan)) for least, plan in pairs])
        return [plans.index(plan) >= least for least, plan in pairs]

    found = run_searches(ExhaustiveSearch(), exits(4), [1, 3, 0], evaluate, 2)
    assert rounds == [[(1, 0), (3, 0), (0, 0)], [(1, 1), (3, 1)]]
    assert found == [Found(plans[1], True, 2), Found(plans[3], False, 2), Found(plans[0], True, 1)]
    assert run_searches(ExhaustiveSearch(), exits(4), [], lambda pairs: pytest.fail("evaluated"), 2) == []


class Careless(Searcher):
    """Goes on whatever the answer, until the probe is gone too."""

    over_menu = False

    def search(self, space):
        for n in range(space.menu.n_layers - 1, 0, -1):
            yield LayerPlan.exiting(space.menu.n_layers, n)


class Pretender(Careless):
    """Makes plans of its own, but says that they are the menu's."""

    over_menu = True

    def search(self, space):
        yield LayerPlan.exiting(space.menu.n_layers, space.menu.n_layers - 1)


class Insatiable(Searcher):
    """Asks for the same plan until it is sufficient."""

    over_menu = True

    def search(self, space):
        while not (yield space.menu.plans[0]):
            pass


class Biased(Searcher):
    """Starts with what was sufficient for another prompt."""

    over_menu = True
    start = 0

    def search(self, space):
        plans = space.shortened
        for i in range(self.start, self.start + len(plans)):
            if (yield plans[i % len(plans)]):
                self.start = i
                return


BREAKS = {
    Careless: "asks_only_for_plans_of_the_space",
    Pretender: "asks_only_for_plans_of_the_space",
    Insatiable: "comes_to_an_end",
    Biased: "many_prompts_at_once_find_what_each_finds_alone",
}


@pytest.mark.parametrize(("broken", "test"), BREAKS.items())
def test_the_suite_catches_broken_searchers(broken, test) -> None:
    suite = SearcherConformance()
    suite.make = broken
    with pytest.raises(AssertionError):
        getattr(suite, f"test_{test}")()


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (Careless, "Careless asked for plan 0, but plans of this space have 8 layers and run layers 0 to 1"),
        (Pretender, "Pretender says that it searches the menu, but asked for plan 0-6, which is not in it"),
        (Insatiable, "Insatiable does not end: it asked 10000 times in a row for plans that it knows"),
    ],
)
def test_the_driver_refuses_broken_searchers(broken, message) -> None:
    with pytest.raises(SearchError, match=message):
        run_search(broken(), NESTED, lambda plan: False, 100)


@pytest.fixture
def labeller(tokenizer, tmp_path):
    model = tiny_model("llama", layer_scale=0.35)
    return Labeller(model, tokenizer, Decoding(4), LabelStore(tmp_path / "labels.db"), 4)


@pytest.fixture
def exits_of_six(labeller):
    sizes = sublayer_bytes(tiny_model("llama"))
    return SearchSpace(PlanMenu.build([LayerPlan.exiting(6, n) for n in (2, 3, 4, 5)], sizes, probe_depth=2), sizes)


def prompts_of(judge: str) -> list[Prompt]:
    return [Prompt(f"p{i}", "t", "hgfedcba"[i % 5 :] + str(i), "", judge) for i in range(9)]


@pytest.mark.parametrize("judge", ["agreement", "kl"])
@pytest.mark.parametrize("tolerance", [0.0, 0.05])
def test_a_search_with_ample_budget_finds_what_the_whole_matrix_says(labeller, exits_of_six, judge, tolerance) -> None:
    prompts = prompts_of(judge)
    found = search_prompts(SEARCHERS["bisection"], exits_of_six, labeller, prompts, len(exits_of_six.menu), tolerance)
    labeller.label(prompts, exits_of_six.menu)
    scores = score_matrix(labeller.read(prompts, exits_of_six.menu))
    least = least_sufficient(sufficient_plans(scores, tolerance))
    assert [exits_of_six.menu.plans.index(one.plan) for one in found] == least.tolist()
    assert all(one.proved for one in found)


def test_searches_that_make_their_own_plans_are_answered_and_kept(labeller, exits_of_six) -> None:
    prompts = prompts_of("agreement")
    found = search_prompts(SEARCHERS["greedy"], exits_of_six, labeller, prompts, 4)
    assert any(one.plan not in exits_of_six.menu.plans for one in found)
    for prompt, one in zip(prompts, found, strict=True):
        assert labeller.scores([prompt], one.plan) == [1.0]
    kept = len(LabelStore(labeller._store.path))
    assert search_prompts(SEARCHERS["greedy"], exits_of_six, labeller, prompts, 4) == found
    assert len(LabelStore(labeller._store.path)) == kept == len(prompts) + sum(one.evaluations for one in found)
