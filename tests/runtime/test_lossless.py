"""Lossless mode: a plan drafts, the full model decides; the answer is the full model's, whatever the plan is worth."""

from dataclasses import replace

import pytest
import torch
from tiny import OPTIONS, UNDECLARED, padded_batch, tiny_model
from tiny_allocator import DICT, FULL, PLANS, Ban, ByLength, Recorder, make_allocator, prompt, with_healing
from transformers import DynamicCache, LogitsProcessorList
from transformers.generation import LogitsProcessor

from backbone.errors import UnsupportedGenerationError
from backbone.execution.apply_plan import apply_plan
from backbone.testing import patches
from runtime import lossless
from runtime.lossless import MAX_DRAFT, PRIOR_JUDGED, DraftPlan, best_draft, draft_plans
from runtime.step_costs import StepCosts

GREEDY = {"max_new_tokens": 24, "do_sample": False, "min_new_tokens": 24}

FLAT = StepCosts((1, 2), (1.0, 1.0), (0.0, 0.0), (1, 2), (1.0, 1.0), True)
"""A check of several tokens takes as long as a step."""


@pytest.fixture
def cheap_drafts(monkeypatch) -> None:
    """However few tokens are accepted, three are drafted."""
    monkeypatch.setattr(lossless, "best_draft", lambda costs, plans: (plans[0], 3))


@pytest.mark.parametrize("family", [*sorted(OPTIONS), *UNDECLARED])
def test_the_answer_is_the_full_models_in_every_family(family, cheap_drafts) -> None:
    model = tiny_model(family)
    allocator = make_allocator(model, controller=ByLength())
    for row in (1, 2, 3):
        expected = model.generate(prompt(row), **GREEDY)
        output = allocator.generate(model, input_ids=prompt(row), **GREEDY, **DICT, lossless=True)
        assert output.plans == [PLANS[0]]
        assert output.draft_tokens >= 10
        assert torch.equal(output.sequences, expected)
        assert 24 <= output.full_passes + output.accepted_tokens <= 24 + 3
        assert output.acceptance == output.accepted_tokens / output.draft_tokens
        other_door = model.generate(prompt(row), **GREEDY, custom_generate=allocator, lossless=True)
        assert torch.equal(other_door, expected)


def test_a_plan_that_agrees_saves_full_passes(cheap_drafts) -> None:
    model = tiny_model("gemma3_text", layer_scale=0.05)
    allocator = make_allocator(model, controller=ByLength())
    output = allocator.generate(model, input_ids=prompt(3), **GREEDY, **DICT, lossless=True)
    assert torch.equal(output.sequences, model.generate(prompt(3), **GREEDY))
    assert output.acceptance > 0.7
    assert output.full_passes < 14


def test_healing_draft_but_do_not_answer(model, cheap_drafts) -> None:
    allocator = replace(with_healing(model), controller=make_allocator(model, controller=ByLength()).controller)
    output = allocator.generate(model, input_ids=prompt(3), **GREEDY, **DICT, lossless=True)
    assert output.draft_tokens > 0
    assert torch.equal(output.sequences, model.generate(prompt(3), **GREEDY))


def test_a_padded_prompt_is_answered_as_without_padding(model, allocator, cheap_drafts) -> None:
    batch = {name: tensor[3:] for name, tensor in padded_batch().items()}
    output = allocator.generate(model, **batch, **GREEDY, lossless=True)
    assert torch.equal(output[:, 11:], model.generate(prompt(3), **GREEDY)[:, 4:])


def test_stock_features_go_on_working(model, allocator, cheap_drafts) -> None:
    ids = prompt(3)
    stock = model.generate(ids, **GREEDY)
    recorder = Recorder()
    output = allocator.generate(model, input_ids=ids, **GREEDY, lossless=True, streamer=recorder)
    assert (recorder.tokens, recorder.ends) == (output[0].tolist(), 1)
    end = int(stock[0, 4 + 9])
    ending = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": [end], "pad_token_id": 0}
    assert torch.equal(allocator.generate(model, input_ids=ids, **ending, lossless=True), model.generate(ids, **ending))
    own = {**GREEDY, **DICT, "output_scores": True, "repetition_penalty": 1.2}
    processors = LogitsProcessorList([Ban(end)])
    found = allocator.generate(model, input_ids=ids, **own, logits_processor=processors, lossless=True)
    want = model.generate(ids, **own, logits_processor=processors)
    assert torch.equal(found.sequences, want.sequences)
    for mine, theirs in zip(found.scores, want.scores, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    assert found.first_token_s > 0


class Only(LogitsProcessor):
    """A tiny vocabulary."""

    def __init__(self, tokens: range) -> None:
        self.tokens = torch.tensor(tokens)

    def __call__(self, input_ids, scores):
        return torch.full_like(scores, -torch.inf).index_copy_(1, self.tokens, scores[:, self.tokens] / HEAT)


HEAT, FEW, DRAWS = 1.0, range(40, 43), 200


def pairs(model, ids) -> torch.Tensor:
    """The probability of each pair of next tokens, the first of them drawn from the full model."""
    few = torch.tensor(FEW)
    extended = torch.cat([ids.expand(len(FEW), -1), few[:, None]], 1)
    with torch.no_grad():
        return (model(extended).logits[:, -1, few] / HEAT).softmax(-1)


def chi_square(counts, expected) -> float:
    """Divided by the degrees of freedom, so that 1 is what the right distribution gives on average."""
    return float(((counts - expected) ** 2 / expected).sum() / (counts.numel() - 1))


def test_samples_follow_the_full_models_distribution(model, allocator, cheap_drafts) -> None:
    ids, counts = prompt(3), torch.zeros(len(FEW), len(FEW))
    with torch.no_grad():
        first = (model(ids).logits[0, -1, torch.tensor(FEW)] / HEAT).softmax(-1)[:, None]
    right = first * pairs(model, ids)
    with apply_plan(model, PLANS[0]):
        of_the_plan = first * pairs(model, ids)
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": True, "top_k": 0, **DICT}
    processors = LogitsProcessorList([Only(FEW)])
    drafted = accepted = 0
    torch.manual_seed(0)
    for _ in range(DRAWS):
        output = allocator.generate(model, input_ids=ids, **options, logits_processor=processors, lossless=True)
        one, two = output.sequences[0, 4:6] - FEW[0]
        counts[one, two] += 1
        drafted, accepted = drafted + output.draft_tokens, accepted + output.accepted_tokens
    assert drafted == DRAWS
    assert 0.2 < accepted / drafted < 0.95, "the draft must be neither right nor useless"
    # 8 degrees of freedom: the right distribution exceeds 3.27 with a probability of 0.1%
    assert chi_square(counts, right * DRAWS) < 3.27
    assert chi_square(counts, of_the_plan * DRAWS) > 3.27, "were drafts just kept, it would show"


def test_drafts_end_where_they_do_not_pay(model, allocator, monkeypatch) -> None:
    monkeypatch.setattr(lossless, "known_step_costs", lambda model: FLAT)
    confident = replace(allocator, acceptance=(0.9, 0.5, 1.0))
    output = confident.generate(model, input_ids=prompt(3), **GREEDY, **DICT, lossless=True)
    assert torch.equal(output.sequences, model.generate(prompt(3), **GREEDY))
    assert output.plans == [PLANS[0]]
    assert 0 < output.draft_tokens < 20, "with two thirds of the layers and few tokens accepted"
    assert output.full_passes + output.accepted_tokens == 24


def test_where_no_plan_pays_the_full_model_decodes_as_ever(model, allocator, monkeypatch) -> None:
    monkeypatch.setattr(lossless, "known_step_costs", lambda model: FLAT)
    hopeless, streamed = replace(allocator, acceptance=(0.1, 0.1, 1.0)), Recorder()
    output = hopeless.generate(model, input_ids=prompt(0), **GREEDY, **DICT, lossless=True, streamer=streamed)
    assert output.plans == [FULL]
    assert (output.draft_tokens, output.acceptance, output.full_passes) == (0, None, 24)
    assert torch.equal(output.sequences, model.generate(prompt(0), **GREEDY))
    assert (streamed.tokens, streamed.ends) == (output.sequences[0].tolist(), 1)
    assert output.first_token_s > 0


def of_rate(budget: float, rate: float) -> DraftPlan:
    return DraftPlan(PLANS[0], budget, rate * PRIOR_JUDGED)


def test_the_draft_is_chosen_by_acceptance_and_costs() -> None:
    assert best_draft(FLAT, [of_rate(0.5, 0.2)]) == (None, 0), "1.2 tokens in 1.5 passes"
    assert best_draft(FLAT, [of_rate(0.5, 0.7)])[1] == 1, "1.7 in 1.5; two drafts: 2.19 in 2"
    assert best_draft(FLAT, [of_rate(0.1, 0.9)])[1] == MAX_DRAFT
    assert best_draft(FLAT, []) == (None, 0)
    cheap, sure = of_rate(0.3, 0.5), of_rate(0.8, 0.95)
    assert best_draft(FLAT, [cheap, sure]) == (cheap, 1), "1.5 in 1.3; the sure one at best 2.85 in 2.6"
    dear_head = StepCosts((1, 2), (1.0, 1.0), (0.3, 0.3), (1, 2), (1.0, 1.0), True)
    assert best_draft(dear_head, [cheap, sure])[0] is sure, "with a step of .51 instead of .3 the cheap plan loses"
    dear_checks = StepCosts((1, 2), (1.0, 1.0), (0.0, 0.0), (1, 2), (1.0, 2.0), True)
    assert best_draft(dear_checks, [of_rate(0.1, 0.9)]) == (None, 0), (
        "a check of two tokens takes as long as two passes"
    )


def test_what_the_labels_say_and_what_stands_in_for_it(allocator) -> None:
    known = draft_plans(replace(allocator, acceptance=(0.6, 0.9, 1.0)))
    assert [(draft.plan, round(draft.rate, 6)) for draft in known] == [(PLANS[0], 0.6), (PLANS[1], 0.9)]
    unknown = draft_plans(allocator)
    assert [draft.rate for draft in unknown] == pytest.approx([1 - 2 * (1 - b) for b in allocator.menu.budgets[:2]])


REFUSED = {
    "static": ({"cache_implementation": "static"}, "cache_implementation='static': drafts are taken back"),
    "cache": ({"cache": DynamicCache()}, r"cache \(DynamicCache\): drafts are taken back"),
    "beams": ({"num_beams": 2}, "num_beams=2: drafts are checked for one prompt"),
    "prompts": (padded_batch(), "one prompt at a time, got 4"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_drafted_is_refused_by_name(model, allocator, name) -> None:
    options, message = REFUSED[name]
    before = patches(model)
    with pytest.raises(UnsupportedGenerationError, match=message):
        allocator.generate(model, **{"input_ids": prompt(3), **GREEDY, **options}, lossless=True)
    assert patches(model) == before
