"""Labels of early exits over prompts that begin alike: equal to generated ones, for about a pass a prompt."""

import pytest
from tiny import tiny_model, tiny_tokenizer

from backbone.execution import shared_prefixes
from backbone.families import decoder_layers, sublayer_bytes
from backbone.plan import LayerPlan, PlanMenu
from oracle.decoding import Decoding
from oracle.labels.labeller import Labeller
from oracle.labels.reader import score_matrix
from oracle.labels.store import LabelStore
from oracle.prompts import Prompt

EXAMPLES = ["say the last letter. abc: c, xyz: z, ijk: k. ", "say the first letter, always. abc: a, pqr: p. "]
DECODING = Decoding(4, ("e",))
JUDGES = ("agreement", "exact", "contains", "rouge_l")


def prompts_of(judge: str) -> list[Prompt]:
    """Two kinds that begin alike, and a prompt of no kind."""
    texts = [f"{EXAMPLES[number % 2]}{'abcdefgh'[: number % 5 + 1]}{number}:" for number in range(14)]
    return [Prompt(f"p{i}", "t", text, "b", judge) for i, text in enumerate([*texts, "quite another text"])]


def labeller_of(model, path, shortcut: bool = True) -> Labeller:
    return Labeller(model, tiny_tokenizer(), DECODING, LabelStore(path), batch_size=4, shortcut=shortcut)


def menu_of(model) -> PlanMenu:
    return PlanMenu.build([LayerPlan.exiting(6, depth) for depth in (3, 4, 5)], sublayer_bytes(model), probe_depth=2)


@pytest.mark.parametrize("judge", JUDGES)
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "bloom", "gpt2"])
def test_labels_of_prompts_that_begin_alike_are_generated_ones(family, judge, tmp_path) -> None:
    model, prompts = tiny_model(family), prompts_of(judge)
    menu, found = menu_of(model), {}
    for name in (True, False):
        labeller = labeller_of(model, tmp_path / f"{name}.db", name)
        labeller.label(prompts, menu)
        found[name] = labeller.read(prompts, menu)
    assert (score_matrix(found[True]) == score_matrix(found[False])).all()
    assert [row[-1].answer_ids for row in found[True]] == [row[-1].answer_ids for row in found[False]]


def test_labels_of_exits_cost_less_than_a_pass_a_prompt(model, tmp_path) -> None:
    prompts, menu = prompts_of("exact"), menu_of(model)
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
    labeller, menu = labeller_of(model, tmp_path / "labels.db"), menu_of(model)
    labeller.label_full(prompts, LayerPlan.full(6))
    calls: list[int] = []
    last = decoder_layers(model)[5].mlp
    handle = last.register_forward_hook(lambda *args: calls.append(1))
    labeller.label(prompts, menu)
    handle.remove()
    assert not calls
    assert len(labeller.read(prompts, menu)) == len(prompts)
