"""All exits of a model answer from one pass, as each does by itself."""

import pytest
import torch
from tiny import OPTIONS, tiny_model, tiny_tokenizer

from backbone.families import decoder_layers
from backbone.fingerprint import model_fingerprint
from backbone.healing.attaching import Healing, attach
from backbone.healing.bridges import Bridge
from backbone.plan import LayerPlan
from oracle.chat import tokens_of
from oracle.decoding import Decoding
from oracle.labels.exit_answers import are_exits, exit_answers, exit_depth
from oracle.labels.generate_answers import answer_batch

PROMPTS = ["abc", "hgfedcba", "aa", "what is this", "zz top"]
EXITS = [LayerPlan.exiting(6, depth) for depth in (2, 3, 5)]
HEALED = LayerPlan.parse("0-5h", 6)
PLANS = [*EXITS, LayerPlan.full(6)]


def two_of_the_first(number: int, ids: list[int], plans: object) -> bool:
    return number == 0 and len(ids) == 2


def with_heads(family: str):
    """A tiny model whose exits after 2 and 3 layers have heads, and the full depth another."""
    model = tiny_model(family)
    size = model.config.get_text_config().hidden_size
    torch.manual_seed(1)
    bridges = {
        plan: {len(plan.attention): Bridge((torch.randn(size, size) / 8,), torch.randn(size))}
        for plan in (*EXITS[:2], HEALED)
    }
    attach(model, Healing(model_fingerprint(model), bridges))
    return model


@pytest.mark.parametrize("family", sorted(OPTIONS))
def test_exits_answer_from_one_pass_as_alone(family) -> None:
    model, tokenizer, decoding = with_heads(family), tiny_tokenizer(), Decoding(6, ("e",))
    plans = [*EXITS, HEALED, LayerPlan.full(6)]
    assert are_exits(model, plans)
    prompts = [tokens_of(tokenizer, text) for text in PROMPTS]
    found = exit_answers(model, tokenizer, prompts, plans, decoding)
    for plan in plans:
        alone = answer_batch(model, tokenizer, PROMPTS, plan, decoding)
        assert [row[plan].ids for row in found] == [answer.token_ids for answer in alone]
    assert len({tuple(answer.ids) for row in found for answer in row.values()}) > len(PROMPTS), "exits differ"
    assert [row[HEALED].ids for row in found] != [row[plans[-1]].ids for row in found], "the head says something else"


def test_exit_answers_end_where_there_is_enough(model, tokenizer) -> None:
    prompts = [tokens_of(tokenizer, text) for text in PROMPTS]
    found = exit_answers(model, tokenizer, prompts, PLANS, Decoding(6), two_of_the_first)
    assert {len(answer.ids) for answer in found[0].values()} <= {1, 2}
    assert max(len(answer.ids) for answer in found[1].values()) > 2


def test_one_pass_over_a_long_prompt_serves_all_exits(model, tokenizer) -> None:
    prompt = tokens_of(tokenizer, "a" * 100)
    (found,) = exit_answers(model, tokenizer, [prompt], PLANS, Decoding(2))
    spent = sum(answer.forward_tokens for answer in found.values())
    assert len(prompt) < spent <= 1.2 * len(prompt)


@pytest.mark.parametrize(
    ("plan", "depth"),
    [
        (LayerPlan.exiting(6, 1), 1),
        (LayerPlan.full(6), 6),
        (HEALED, 6),
        (LayerPlan.skipping(6, {3}), None),
        (LayerPlan.skipping(6, {0, 4, 5}), None),
        (LayerPlan.skipping(6, attention={5}), None),
    ],
)
def test_exit_depth_knows_other_shapes(plan, depth) -> None:
    assert exit_depth(plan) == depth


def test_are_exits_refuses_changed_weights_and_gaps(model) -> None:
    assert are_exits(model, PLANS)
    assert not are_exits(model, [*PLANS, LayerPlan.skipping(6, {3})])
    assert len(decoder_layers(model)) == 6
