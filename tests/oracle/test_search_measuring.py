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
from oracle.search.base import SearchSpace
from oracle.search.on_model import search_prompts


@pytest.fixture
def labeller(tokenizer, tmp_path):
    model = tiny_model("llama", layer_scale=0.35)
    return Labeller(model, tokenizer, Decoding(4), LabelStore(tmp_path / "labels.db"), 4)


@pytest.fixture
def space(labeller):
    sizes = sublayer_bytes(tiny_model("llama"))
    return SearchSpace(PlanMenu.build([LayerPlan.exiting(6, n) for n in (2, 3, 4, 5)], sizes, probe_depth=2), sizes)


def prompts_of(judge: str) -> list[Prompt]:
    return [Prompt(f"p{i}", "t", "hgfedcba"[i % 5 :] + str(i), "", judge) for i in range(9)]


@pytest.mark.parametrize("judge", ["agreement", "kl"])
@pytest.mark.parametrize("tolerance", [0.0, 0.05])
def test_a_search_with_ample_budget_finds_what_the_whole_matrix_says(labeller, space, judge, tolerance) -> None:
    prompts = prompts_of(judge)
    found = search_prompts(SEARCHERS["bisection"], space, labeller, prompts, len(space.menu), tolerance)
    labeller.label(prompts, space.menu)
    scores = score_matrix(labeller.read(prompts, space.menu))
    least = least_sufficient(sufficient_plans(scores, tolerance))
    assert [space.menu.plans.index(one.plan) for one in found] == least.tolist()
    assert all(one.proved for one in found)


def test_searches_that_make_their_own_plans_are_answered_and_kept(labeller, space) -> None:
    prompts = prompts_of("agreement")
    found = search_prompts(SEARCHERS["greedy"], space, labeller, prompts, 4)
    assert any(one.plan not in space.menu.plans for one in found)
    for prompt, one in zip(prompts, found, strict=True):
        assert labeller.scores([prompt], one.plan) == [1.0]
    kept = len(LabelStore(labeller._store.path))
    assert search_prompts(SEARCHERS["greedy"], space, labeller, prompts, 4) == found
    assert len(LabelStore(labeller._store.path)) == kept == len(prompts) + sum(one.evaluations for one in found)
