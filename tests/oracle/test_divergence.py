import math

import numpy as np
import pytest
import torch
from tiny import tiny_model

from backbone.execution.apply_plan import apply_plan
from backbone.families import decoder_layers, sublayer_bytes
from backbone.plan import LayerPlan, PlanMenu
from oracle.decoding import Decoding
from oracle.judges import JudgeError, check_judge, score
from oracle.labels.generation import answer_batch
from oracle.labels.labeller import Labeller
from oracle.labels.reader import score_matrix
from oracle.labels.store import CUT, LabelStore
from oracle.labels.verification import diverge, mean_divergence
from oracle.prompts import Prompt

TEXTS = ["abc", "hgfedcba", "b", "cde"]
PROMPTS = [Prompt(f"p{i}", "t", text, "", "kl") for i, text in enumerate(TEXTS)]
PLANS = [LayerPlan.skipping(6, {4}), LayerPlan.skipping(6, {4}, attention={2}), LayerPlan.exiting(6, 2)]


def rows_of(tokenizer, answers):
    return [(tokenizer(text).input_ids, answer) for text, answer in zip(TEXTS, answers, strict=True)]


def nothing_in(model, layer: int) -> None:
    """Zero the weights by which a layer of a Llama adds to the residual."""
    block = decoder_layers(model)[layer]
    torch.nn.init.zeros_(block.self_attn.o_proj.weight)
    torch.nn.init.zeros_(block.mlp.down_proj.weight)


def test_the_mean_divergence_is_the_textbooks() -> None:
    expected = torch.tensor([[0.5, 0.5], [0.9, 0.1]])
    own = torch.tensor([[0.25, 0.75], [0.9, 0.1]])
    by_hand = (0.5 * math.log(2) + 0.5 * math.log(0.5 / 0.75)) / 2
    assert mean_divergence(expected.log(), own.log()) == pytest.approx(by_hand, rel=1e-5)
    assert math.isnan(mean_divergence(expected.log(), own * torch.nan))


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
def test_plans_that_share_passes_diverge_as_each_alone(family, tokenizer) -> None:
    model = tiny_model(family)
    answers = [answer_batch(model, tokenizer, [text], LayerPlan.full(6), Decoding(4))[0].token_ids for text in TEXTS]
    found = diverge(model, rows_of(tokenizer, answers), PLANS)
    for text, answer, row in zip(TEXTS, answers, found, strict=True):
        ids = torch.tensor([[*tokenizer(text).input_ids, *answer[:-1]]])
        logits = []
        for plan in (LayerPlan.full(6), *PLANS):
            with torch.inference_mode(), apply_plan(model, plan):
                logits.append(model(input_ids=ids).logits[0, -len(answer) :])
        for plan, own in zip(PLANS, logits[1:], strict=True):
            assert row[plan].nats == pytest.approx(mean_divergence(logits[0].log_softmax(-1), own), rel=1e-3, abs=1e-5)
            assert row[plan].score == math.exp(-row[plan].nats)
    assert sum(far.forward_tokens for far in found[0].values()) < 4 * (3 + 3)


def test_a_plan_without_effect_and_the_full_one_score_1_and_less_is_worse(tokenizer, tmp_path) -> None:
    model = tiny_model("llama")
    nothing_in(model, 4)
    menu = PlanMenu.build([LayerPlan.exiting(6, 2), LayerPlan.skipping(6, {4})], sublayer_bytes(model), 2)
    labeller = Labeller(model, tokenizer, Decoding(4), LabelStore(tmp_path / "labels.db"), 3)
    labeller.label(PROMPTS, menu)
    scores = score_matrix(labeller.read(PROMPTS, menu))
    np.testing.assert_array_equal(scores[:, 1:], 1)
    assert ((scores[:, 0] > 0) & (scores[:, 0] < 0.99)).all()


@pytest.mark.parametrize("verify", [False, True])
def test_its_labels_carry_what_agrees_with_the_full_answer_and_go_on_where_they_stopped(
    model, tokenizer, tmp_path, verify
) -> None:
    prompts = [*PROMPTS, Prompt("other", "t", "ab", "", "agreement")]
    menu = PlanMenu.build(PLANS, sublayer_bytes(model), 2)
    store = LabelStore(tmp_path / "labels.db")
    Labeller(model, tokenizer, Decoding(4), store, 4, verify=verify).label(prompts[1:], menu)
    labeller, done = Labeller(model, tokenizer, Decoding(4), store, 4, verify=verify), []
    labeller.label(prompts, menu, done.append)
    assert sum(done) == len(menu)
    assert len(store) == len(prompts) * len(menu)
    for *rows, full in labeller.read(PROMPTS, menu):
        assert full.score == 1
        assert not full.answer.endswith(CUT)
        for found in rows:
            assert found.answer == CUT
            assert found.answer_ids[:-1] == full.answer_ids[: len(found.answer_ids) - 1]
            assert 0 < found.score < 1
            assert 0 < found.forward_tokens < 2 * (found.prompt_tokens + len(found.answer_ids))


def test_what_a_plan_repeats_of_the_answer_is_what_it_says_by_itself(model, tokenizer) -> None:
    full, *plans = LayerPlan.full(6), *PLANS
    answers = [answer.token_ids for answer in answer_batch(model, tokenizer, TEXTS, full, Decoding(4))]
    found = diverge(model, rows_of(tokenizer, answers), plans)
    for plan in plans:
        alone = answer_batch(model, tokenizer, TEXTS, plan, Decoding(4))
        for row, own in zip(found, alone, strict=True):
            assert list(row[plan].ids) == list(own.token_ids[: len(row[plan].ids)])


def test_a_model_that_gives_no_numbers_is_noted(tokenizer, tmp_path) -> None:
    model = tiny_model("llama")
    menu = PlanMenu.build([LayerPlan.exiting(6, 2)], sublayer_bytes(model), 2)
    labeller = Labeller(model, tokenizer, Decoding(2), LabelStore(tmp_path / "labels.db"), 4)
    labeller.label(PROMPTS, PlanMenu((LayerPlan.full(6),), (1.0,), 2))
    torch.nn.init.constant_(decoder_layers(model)[5].mlp.down_proj.weight, float("nan"))
    labeller.label(PROMPTS, menu)
    assert np.isnan(score_matrix(labeller.read(PROMPTS, menu))[:, 0]).all()
    assert labeller.failures[0] == "the judge 'kl' failed on prompt 'p1': the model's logits are NaN"


def test_it_is_a_judge_by_name_but_scores_no_text() -> None:
    check_judge("kl")
    with pytest.raises(JudgeError, match="the judge 'kl' scores distributions, not answers"):
        score("kl", "a", "b", "c")
    with pytest.raises(JudgeError, match="did you mean 'kl'"):
        check_judge("kll")
