"""All exits of a model answer from one pass, as each does by itself."""

import pytest
import torch
from tiny import OPTIONS, tiny_model, tiny_tokenizer

from backbone.execution import shared_prefixes
from backbone.families import decoder_layers, model_fingerprint, sublayer_bytes
from backbone.healing.healing import Adapter, Bridge, Healing
from backbone.plan import LayerPlan, PlanMenu
from oracle.chat import tokens_of
from oracle.decoding import Decoding
from oracle.labels.exit_answers import are_exits, exit_answers, exit_depth
from oracle.labels.generation import answer_batch
from oracle.labels.labeller import Labeller
from oracle.labels.reader import score_matrix
from oracle.labels.store import LabelStore
from oracle.prompts import Prompt

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
    return model, Healing(model_fingerprint(model), bridges).ready(model)


@pytest.mark.parametrize("family", sorted(OPTIONS))
def test_exits_answer_from_one_pass_as_alone(family) -> None:
    (model, healing), tokenizer, decoding = with_heads(family), tiny_tokenizer(), Decoding(6, ("e",))
    plans = [*EXITS, HEALED, LayerPlan.full(6)]
    assert are_exits(plans, healing)
    prompts = [tokens_of(tokenizer, text) for text in PROMPTS]
    found = exit_answers(model, tokenizer, prompts, plans, decoding, healing=healing)
    for plan in plans:
        alone = answer_batch(model, tokenizer, PROMPTS, plan, decoding, healing)
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
    name = "model.layers.4.mlp.down_proj.weight"
    adapter = Adapter({name: (torch.ones(32, 1), torch.ones(1, 64))})
    adapted = Healing(model_fingerprint(model), {}, adapter).ready(model)
    assert are_exits(PLANS, None)
    assert not are_exits([*PLANS, LayerPlan.skipping(6, {3})], None)
    assert not are_exits(PLANS, adapted)
    assert are_exits([LayerPlan.full(6)], adapted)


EXAMPLES = ["say the last letter. abc: c, xyz: z, ijk: k. ", "say the first letter, always. abc: a, pqr: p. "]
STOPPING = Decoding(4, ("e",))
JUDGES = ("agreement", "exact", "contains", "rouge_l")


def prompts_of(judge: str) -> list[Prompt]:
    """Two kinds that begin alike, and a prompt of no kind."""
    texts = [f"{EXAMPLES[number % 2]}{'abcdefgh'[: number % 5 + 1]}{number}:" for number in range(14)]
    return [Prompt(f"p{i}", "t", text, "b", judge) for i, text in enumerate([*texts, "quite another text"])]


def labeller_of(model, path, verify: bool = True) -> Labeller:
    return Labeller(model, tiny_tokenizer(), STOPPING, LabelStore(path), batch_size=4, verify=verify)


def exits_menu(model) -> PlanMenu:
    return PlanMenu.build([LayerPlan.exiting(6, depth) for depth in (3, 4, 5)], sublayer_bytes(model), probe_depth=2)


@pytest.mark.parametrize("judge", JUDGES)
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "bloom", "gpt2"])
def test_labels_of_prompts_that_begin_alike_are_generated_ones(family, judge, tmp_path) -> None:
    model, prompts = tiny_model(family), prompts_of(judge)
    menu, found = exits_menu(model), {}
    for name in (True, False):
        labeller = labeller_of(model, tmp_path / f"{name}.db", name)
        labeller.label(prompts, menu)
        found[name] = labeller.read(prompts, menu)
    assert (score_matrix(found[True]) == score_matrix(found[False])).all()
    assert [row[-1].answer_ids for row in found[True]] == [row[-1].answer_ids for row in found[False]]


def test_labels_of_exits_cost_less_than_a_pass_a_prompt(model, tmp_path) -> None:
    prompts, menu = prompts_of("exact"), exits_menu(model)
    labeller = labeller_of(model, tmp_path / "labels.db")
    labeller.label(prompts, menu)
    labels = labeller.read(prompts, menu)
    spent = sum(label.forward_tokens for row in labels for label in row)
    assert spent < 0.7 * sum(row[0].prompt_tokens for row in labels)


def test_full_answers_of_prompts_that_begin_alike_share_their_beginning(model, tmp_path, monkeypatch) -> None:
    run: list[int] = []
    real = shared_prefixes.run_prefix
    monkeypatch.setattr(
        shared_prefixes, "run_prefix", lambda *a, **k: run.append(k["input_ids"].numel()) or real(*a, **k)
    )
    labeller_of(model, tmp_path / "labels.db").label_full(prompts_of("exact"), LayerPlan.full(6))
    assert 2 <= len(run) <= 4, "of each kind, at most once a block"
    assert min(run) >= min(map(len, EXAMPLES))


def test_layers_behind_the_deepest_exit_do_not_run_for_known_full_answers(tmp_path, monkeypatch) -> None:
    model, prompts = tiny_model("llama"), prompts_of("agreement")
    labeller, menu = labeller_of(model, tmp_path / "labels.db"), exits_menu(model)
    labeller.label_full(prompts, LayerPlan.full(6))
    calls: list[int] = []
    last = decoder_layers(model)[5].mlp
    handle = last.register_forward_hook(lambda *args: calls.append(1))
    labeller.label(prompts, menu)
    handle.remove()
    assert not calls
    assert len(labeller.read(prompts, menu)) == len(prompts)
