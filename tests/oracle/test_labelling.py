import json
import random
import signal
import sqlite3
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from tiny import tiny_model

from backbone.execution.apply_plan import apply_plan
from backbone.families import model_fingerprint, sublayer_bytes
from backbone.healing.healing import Bridge, Healing
from backbone.plan import LayerPlan, PlanMenu
from oracle.decoding import Decoding, DecodingError, cut_at_stop
from oracle.labels import answers as answering
from oracle.labels import generation as generating
from oracle.labels.answers import Answers, Draft
from oracle.labels.generation import SharedBatch, answer_batch, stop_token_ids
from oracle.labels.labeller import Labeller
from oracle.labels.reader import acceptance_rates, key_of, score_matrix
from oracle.labels.store import CUT, Label, LabelStore, StoreError
from oracle.labels.verification import verify
from oracle.prompts import Prompt, PromptError, Shard

DECODING = Decoding(4)
PROMPTS = [Prompt(f"p{i}", "t", "abcdefgh"[: i % 7 + 1] + str(i), "", "agreement") for i in range(11)]


def menu_of(model) -> PlanMenu:
    return PlanMenu.build([LayerPlan.skipping(6, {4}), LayerPlan.exiting(6, 3)], sublayer_bytes(model), probe_depth=2)


def label(number: int, **changes) -> Label:
    values = {"model": "m", "prompt": f"p{number}", "plan": "0-5", "decoding": "d", "judge": "exact", "answer": "a"}
    costs = {"prompt_tokens": 3, "forward_tokens": 5.0, "seconds": 0.1}
    return Label(**{**values, "answer_ids": (7, 2), "score": 1.0, **costs, **changes})


def test_acceptance_counts_tokens_up_to_the_first_that_is_not_the_full_models() -> None:
    full = label(1, answer_ids=(5, 6, 7, 2))
    cut = [label(1, answer_ids=(5, 6, 9)), label(1, answer_ids=(5, 6, 7, 2)), full]
    other = label(2, answer_ids=(8, 2))
    longer = [label(2, answer_ids=(8, 4, 4)), label(2, answer_ids=(8,)), other]
    assert acceptance_rates([cut, longer]) == (3 / 5, 5 / 5, 1.0)
    assert acceptance_rates([[label(1, answer_ids=()), full]]) == (1.0, 1.0), "nothing was judged"


def test_labels_equal_generating_each_prompt_alone(model, tokenizer, tmp_path) -> None:
    menu, steps = menu_of(model), []
    labeller = Labeller(model, tokenizer, DECODING, LabelStore(tmp_path / "labels.db"), batch_size=4, verify=False)
    labeller.label(PROMPTS, menu, steps.append)
    assert sum(steps) == len(PROMPTS) * len(menu)
    labels = labeller.read(PROMPTS, menu)
    for prompt, row in zip(PROMPTS, labels, strict=True):
        answers = [answer_batch(model, tokenizer, [prompt.prompt], plan, DECODING)[0] for plan in menu.plans]
        assert [found.answer for found in row] == [answer.text for answer in answers]
        assert [list(found.answer_ids) for found in row] == [answer.token_ids for answer in answers]
        assert [found.score for found in row] == [float(answer.text == answers[-1].text) for answer in answers]
        assert row[0].prompt_tokens == len(prompt.prompt)
        assert row[0].forward_tokens == (len(prompt.prompt) + len(answers[0].token_ids)) * 0.5
    scores = score_matrix(labels)
    assert scores.shape == (11, 3)
    assert (scores[:, -1] == 1).all()


@pytest.fixture(scope="module", params=["llama", "gemma3_text", "gpt2"])
def gentle(request):
    """A model whose layers change little, so that plans follow the full model for some tokens or for all."""
    return tiny_model(request.param, layer_scale=0.35)


STOPS = ("e", "hg")
SKIP = LayerPlan.skipping
GAPS = [SKIP(6, {5}), SKIP(6, {4}, attention={2}), SKIP(6, {3, 5}), LayerPlan.exiting(6, 2)]
EXITS = [LayerPlan.exiting(6, depth) for depth in (2, 3, 5)]


@pytest.mark.parametrize("stop", [(), STOPS])
@pytest.mark.parametrize("judge", ["agreement", "exact", "rouge_l"])
@pytest.mark.parametrize("way", ["generation", "one pass", "verification"])
def test_verification_gives_the_labels_of_plain_generation(
    gentle, tokenizer, tmp_path, judge, stop, way, monkeypatch
) -> None:
    if way == "verification":  # as for exits whose weights an adapter changes
        monkeypatch.setattr("oracle.labels.labeller.are_exits", lambda plans, healing: False)
    prompts = [Prompt(f"p{i}", "t", "hgfedcba"[i % 5 :] + str(i), "abc", judge) for i in range(12)]
    menu = PlanMenu.build(GAPS if way == "generation" else EXITS, sublayer_bytes(gentle), probe_depth=2)
    rows = {}
    for verifies in (False, True):
        store = LabelStore(tmp_path / f"{verifies}.db")
        labeller = Labeller(gentle, tokenizer, Decoding(6, stop), store, batch_size=3, verify=verifies)
        labeller.label(prompts, menu)
        assert len(store) == len(prompts) * len(menu)
        rows[verifies] = [label for row in labeller.read(prompts, menu) for label in row]
    for plain, short in zip(rows[False], rows[True], strict=True):
        assert short.score == plain.score
        if short.answer.endswith(CUT):
            assert judge in ("agreement", "exact")
            assert short.answer_ids == plain.answer_ids[: len(short.answer_ids)]
        else:
            assert (short.answer, short.answer_ids) == (plain.answer, plain.answer_ids)
    k = len(menu)
    assert any(a.answer == b.answer for a, b in zip(rows[False][k - 2 :: k], rows[False][k - 1 :: k], strict=True))
    if judge != "rouge_l":
        assert sum(label.forward_tokens for label in rows[True]) < sum(label.forward_tokens for label in rows[False])


OWN_SETTINGS = [
    {"repetition_penalty": 3.0},
    {"eos_token_id": [2, 40, 41, 42, 43, 44, 45]},
    {"no_repeat_ngram_size": 1, "num_beams": 3, "do_sample": True, "temperature": 9.0},
    {"suppress_tokens": list(range(60, 97)), "min_new_tokens": 4},
]


@pytest.mark.parametrize("own", OWN_SETTINGS, ids=lambda own: min(own))
@pytest.mark.parametrize("verifies", [True, False])
def test_labels_are_what_generate_gives_with_the_models_own_generation_config(
    gentle, tokenizer, tmp_path, own, verifies, monkeypatch
) -> None:
    for name, value in own.items():
        monkeypatch.setattr(gentle.generation_config, name, value)
    menu, store = menu_of(gentle), LabelStore(tmp_path / "labels.db")
    batch_size = 1 if "no_repeat_ngram_size" in own else 4  # which the library lets count the padding, too
    labeller = Labeller(gentle, tokenizer, Decoding(6), store, batch_size, verify=verifies)
    prompts = [replace(prompt, judge="rouge_l") for prompt in PROMPTS[::2]]  # which needs answers to their ends
    labeller.label(prompts, menu)
    for prompt, row in zip(prompts, labeller.read(prompts, menu), strict=True):
        inputs = tokenizer([prompt.prompt], return_tensors="pt")
        for plan, found in zip(menu.plans, row, strict=True):
            with apply_plan(gentle, plan):
                output = gentle.generate(**inputs, max_new_tokens=6, do_sample=False, num_beams=1)
            assert list(found.answer_ids) == output[0, inputs["input_ids"].shape[1] :].tolist(), plan
    assert str(labeller.decoding) != str(Decoding(6))
    assert labeller.decoding.of(gentle, tokenizer) == labeller.decoding


def test_labels_of_another_generation_config_are_not_taken_for_these(gentle, tokenizer, tmp_path, monkeypatch) -> None:
    store, menu = LabelStore(tmp_path / "labels.db"), menu_of(gentle)
    Labeller(gentle, tokenizer, Decoding(6), store, 4).label(PROMPTS, menu)
    monkeypatch.setattr(gentle.generation_config, "repetition_penalty", 2.0)
    penalised = Labeller(gentle, tokenizer, Decoding(6), store, 4)
    assert len(penalised.missing(PROMPTS, menu.plans[0])) == len(PROMPTS)
    plain = Labeller(gentle, tokenizer, Decoding(6, options={"repetition_penalty": 1.0}), store, 4)
    plain.label(PROMPTS, menu)
    monkeypatch.undo()
    before = Labeller(gentle, tokenizer, Decoding(6), store, 4)
    assert [[label.answer_ids for label in row] for row in plain.read(PROMPTS, menu)] == [
        [label.answer_ids for label in row] for row in before.read(PROMPTS, menu)
    ], "a setting of the run counts more than the model's"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_new_tokens": 0}, "number from 1"),
        ({"max_new_tokens": True}, "number from 1"),
        ({"stop": [""]}, "1 to 1000 characters"),
        ({"stop": "ab"}, "list of strings"),
        ({"ends": [-1]}, "token ids"),
        ({"options": {"do_sample": True}}, "answers are greedy"),
        ({"options": {"repetition_penality": 2}}, "no argument of generate"),
        ({"options": []}, "must hold arguments"),
        ({"other": 1}, "should hold"),
    ],
)
def test_decoding_that_cannot_be_is_one_sentence(changes, message) -> None:
    good = Decoding(6, ("\n",), (3,), {"repetition_penalty": 1.2})
    assert Decoding.from_dict(json.loads(json.dumps(good.to_dict()))) == good
    with pytest.raises(DecodingError, match=message):
        Decoding.from_dict({**good.to_dict(), **changes})


@pytest.mark.parametrize(
    ("text", "stops", "diverged"),
    [
        ("abx", (), True),
        ("ab", (), False),
        ("ab ", (), False),
        ("abcd", (), True),
        ("abE", ("END",), False),
        ("x\nab", ("\n",), True),
        ("ab\nx", ("\n",), False),
    ],
)
def test_a_text_diverges_when_no_continuation_can_agree(text, stops, diverged, model, tokenizer) -> None:
    answers = Answers(model, tokenizer, Decoding(9, stops))
    assert answers.has_diverged(PROMPTS[0], tokenizer(text).input_ids, "abc") == diverged


def test_a_row_ends_when_there_is_enough_of_it(model, tokenizer) -> None:
    plan, prompts = LayerPlan.exiting(6, 4), [tokenizer(text).input_ids for text in ("abc", "hgfed", "b")]
    batch = SharedBatch(model, tokenizer, prompts, [plan], Decoding(6))
    whole = batch.continued(plan, {row: lambda ids: False for row in range(3)}, 6)
    wanted = (2, 7, 1)
    part = batch.continued(plan, {row: lambda ids, n=n: len(ids) >= n for row, n in enumerate(wanted)}, 6)
    assert part == [ids[:n] for ids, n in zip(whole, wanted, strict=True)]
    assert [len(ids) for ids in part] == [2, 6, 1]


def test_no_more_is_generated_than_decides_the_score(model, tokenizer, tmp_path) -> None:
    plan, answers = LayerPlan.exiting(6, 3), Answers(model, tokenizer, Decoding(6))
    labeller = Labeller(model, tokenizer, Decoding(6), LabelStore(tmp_path / "labels.db"), 4)
    menu = PlanMenu.build([plan], sublayer_bytes(model), 2)
    labeller.label(PROMPTS, menu)
    full = {prompt: row[-1] for prompt, row in zip(PROMPTS, labeller.read(PROMPTS, menu), strict=True)}
    plain = [answer_batch(model, tokenizer, [prompt.prompt], plan, Decoding(6))[0] for prompt in PROMPTS]
    (finished,) = answers.generated([Draft(prompt, plan) for prompt in PROMPTS], full)
    assert any(len(draft.ids) < 6 for draft in finished)
    for draft, answer in zip(finished, plain, strict=True):
        known = full[draft.prompt].answer
        assert list(draft.ids) == answer.token_ids[: len(draft.ids)]
        assert answers.is_decided(draft.prompt, draft.ids, known)
        assert not any(answers.is_decided(draft.prompt, draft.ids[:n], known) for n in range(1, len(draft.ids)))
        assert draft.forward_tokens == (len(draft.prompt.prompt) + len(draft.ids)) * 0.5
    judged = [Prompt(prompt.id, "t", prompt.prompt, "", "rouge_l") for prompt in PROMPTS]
    (whole,) = answers.generated([Draft(p, plan) for p in judged], dict(zip(judged, full.values(), strict=True)))
    assert [list(draft.ids) for draft in whole] == [answer.token_ids for answer in plain]


GAP, END = LayerPlan.skipping(6, {3}), LayerPlan.skipping(6, {4, 5})


def test_each_plan_gets_the_labels_that_it_lacks(model, tokenizer, tmp_path) -> None:
    """As after a stop: one plan has all labels but one, another has none."""
    labeller = Labeller(model, tokenizer, DECODING, LabelStore(tmp_path / "labels.db"), batch_size=4)
    full = LayerPlan.full(6)
    labeller.label_some({full: PROMPTS, GAP: PROMPTS[1:]}, full)
    menu = PlanMenu.build([GAP, END], sublayer_bytes(model), probe_depth=2)
    labeller.label_some(dict.fromkeys([GAP, END], PROMPTS), full)
    assert score_matrix(labeller.read(PROMPTS, menu)).shape == (len(PROMPTS), 3)


def test_prompts_become_tokens_once(model, tokenizer, tmp_path, monkeypatch) -> None:
    asked: list[str] = []
    real = answering.tokens_of
    monkeypatch.setattr(answering, "tokens_of", lambda of, text: asked.append(text) or real(of, text))
    for plans in (EXITS, GAPS):
        asked.clear()
        labeller = Labeller(model, tokenizer, DECODING, LabelStore(tmp_path / f"{len(plans)}.db"), batch_size=4)
        labeller.label(PROMPTS, PlanMenu.build(plans, sublayer_bytes(model), probe_depth=2))
        assert sorted(asked) == sorted(prompt.prompt for prompt in PROMPTS)


@pytest.fixture
def bridged(gentle):
    """A model, and healing with a bridge over the gap of each plan."""
    draw = torch.Generator().manual_seed(0)
    bridges = {
        plan: {first: Bridge((torch.randn(32, 32, generator=draw) * 0.1,), torch.randn(32, generator=draw))}
        for plan, first in ((GAP, 3), (END, 4))
    }
    return gentle, Healing(model_fingerprint(gentle), bridges).ready(gentle)


def _out_of_memory(*given: object, **options: object) -> None:
    raise torch.OutOfMemoryError


@pytest.mark.parametrize("memory", ["enough", "none to keep states", "little"])
def test_plans_share_what_they_begin_with_and_answer_as_alone(
    bridged, tokenizer, tmp_path, memory, monkeypatch
) -> None:
    prompts = [Prompt(prompt.id, "t", prompt.prompt, "", "rouge_l") for prompt in PROMPTS[:6]]
    (model, healing), texts, decoding = bridged, [prompt.prompt for prompt in prompts], Decoding(6)
    alone = {plan: answer_batch(model, tokenizer, texts, plan, decoding, healing) for plan in (GAP, END)}
    labeller = Labeller(model, tokenizer, decoding, LabelStore(tmp_path / "labels.db"), 8, healing)
    labeller.label_full(prompts, LayerPlan.full(6))
    labels = labeller.labels(LayerPlan.full(6), prompts)
    drafts = [
        *(Draft(prompt, GAP) for prompt in prompts),
        *(Draft(prompt, END) for prompt in prompts[1:4]),
        Draft(prompts[5], END, tuple(alone[END][5].token_ids[:1])),
    ]
    shared = 3
    if memory == "none to keep states":
        shared = 0
        monkeypatch.setattr(generating, "run_prefix", _out_of_memory)
    elif memory == "little":
        whole = model.generate

        def of_two(input_ids, **options):
            return whole(input_ids=input_ids, **options) if len(input_ids) <= 2 else _out_of_memory()

        monkeypatch.setattr(model, "generate", of_two)
    full = {prompt: labels[key_of(prompt)] for prompt in prompts}
    found = [draft for some in Answers(model, tokenizer, decoding, healing).generated(drafts, full) for draft in some]
    assert [(draft.prompt, draft.plan) for draft in found] == [(draft.prompt, draft.plan) for draft in drafts]
    for draft in found:
        assert list(draft.ids) == alone[draft.plan][prompts.index(draft.prompt)].token_ids

    def cost(draft, layers, sharing):
        return (len(draft.prompt.prompt) * (layers - shared + shared / sharing) + len(draft.ids) * layers) / 6

    assert found[0].forward_tokens == pytest.approx(cost(found[0], 5, sharing=1))
    assert found[1].forward_tokens == pytest.approx(cost(found[1], 5, sharing=2))
    assert found[6].forward_tokens == pytest.approx(cost(found[6], 4, sharing=2))


def test_verification_says_how_far_a_plan_repeats_an_answer(gentle, tokenizer) -> None:
    plan, ids = LayerPlan.skipping(6, {4}), tokenizer("abcd").input_ids
    own = answer_batch(gentle, tokenizer, ["abcd"], plan, Decoding(4))[0].token_ids
    other = [*own[:2], own[2] + 1, 9]
    whole, part = (verify(gentle, [(ids, answer)], [plan])[0][plan] for answer in (own, other))
    assert (whole.matches, whole.ids) == ((True,) * len(own), tuple(own))
    assert (part.matches[:3], part.ids) == ((True, True, False), tuple(own[:3]))
    assert whole.forward_tokens == pytest.approx((4 + 3) * 5 / 6)


def test_labelling_goes_on_where_it_stopped(model, tokenizer, tmp_path) -> None:
    menu, store = menu_of(model), LabelStore(tmp_path / "labels.db")
    labeller = Labeller(model, tokenizer, DECODING, store, batch_size=4)
    done = []

    def stop_after_three_batches(n: int) -> None:
        done.append(n)
        if len(done) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        labeller.label(PROMPTS, menu, stop_after_three_batches)
    assert len(store) == sum(done)
    rest = []
    labeller.label(PROMPTS, menu, rest.append)
    assert sum(done) + sum(rest) == len(store) == len(PROMPTS) * len(menu)
    labeller.label(PROMPTS, menu, lambda n: pytest.fail("labelled again"))


def test_labels_of_other_decodings_do_not_mix(model, tokenizer, tmp_path) -> None:
    menu, store = menu_of(model), LabelStore(tmp_path / "labels.db")
    Labeller(model, tokenizer, Decoding(2), store, 4).label(PROMPTS, menu)
    other = Labeller(model, tokenizer, Decoding(3), store, 4)
    assert len(other.missing(PROMPTS, menu.plans[0])) == len(PROMPTS)


def test_scores_by_an_older_meaning_of_a_judge_are_not_read(model, tokenizer, tmp_path) -> None:
    prompts = [replace(prompt, judge="exact", reference="abc") for prompt in PROMPTS]
    labeller = Labeller(model, tokenizer, DECODING, LabelStore(tmp_path / "labels.db"), 4)
    full = menu_of(model).plans[-1]
    labeller.label_full(prompts, full)
    assert labeller.missing(prompts, full) == []
    with sqlite3.connect(tmp_path / "labels.db") as connection:
        connection.execute("UPDATE labels SET judge = 'exact'")  # as version 0.2 wrote it
    assert labeller.missing(prompts, full) == prompts


def test_an_answer_goes_on_while_one_of_its_references_fits(model, tokenizer) -> None:
    prompt = Prompt("p", "t", "a", "abc", "exact", alternatives=("xyz",))
    answers = Answers(model, tokenizer, DECODING)
    begun = {text: tokenizer(text).input_ids for text in ("ab", "xy", "xyz", "xa")}
    assert [text for text, ids in begun.items() if answers.has_diverged(prompt, ids, "")] == ["xa"]


@pytest.mark.parametrize("verifies", [False, True])
def test_a_judge_that_fails_on_one_prompt_does_not_stop_the_run(
    model, tokenizer, tmp_path, monkeypatch, verifies
) -> None:
    (tmp_path / "fussy_judge.py").write_text(
        "def judge(answer, reference, full):\n"
        "    if reference == 'no':\n        raise OSError('no disk')\n"
        "    return float('nan') if reference == 'nan' else 1.0\n"
    )
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    prompts = [
        Prompt(f"p{i}", "t", "abc" * (i + 1), word, "fussy_judge:judge") for i, word in enumerate(("no", "nan", "ok"))
    ]
    labeller = Labeller(model, tokenizer, DECODING, LabelStore(tmp_path / "labels.db"), 4, verify=verifies)
    labeller.label(prompts, menu_of(model))
    scores = score_matrix(labeller.read(prompts, menu_of(model)))
    np.testing.assert_array_equal(np.isnan(scores).all(axis=1), [True, True, False])
    assert len(labeller.failures) == 6
    assert "the judge 'fussy_judge:judge' failed on prompt 'p0': no disk" in labeller.failures
    gave = "the prompt 'p1': the judge 'fussy_judge:judge' gave the score nan; a score is a number in [0, 1]"
    assert gave in labeller.failures
    labeller.label(prompts, menu_of(model), lambda n: pytest.fail("labelled again"))


def test_shards_label_one_store_together(model, tokenizer, tmp_path) -> None:
    menu, store = menu_of(model), LabelStore(tmp_path / "labels.db")
    shards = [Shard(number, 3).select(PROMPTS) for number in (1, 2, 3)]
    assert sorted(prompt.id for shard in shards for prompt in shard) == sorted(prompt.id for prompt in PROMPTS)
    for shard in shards:
        Labeller(model, tokenizer, DECODING, store, 4).label(shard, menu)
    whole = LabelStore(tmp_path / "whole.db")
    Labeller(model, tokenizer, DECODING, whole, 4).label(PROMPTS, menu)
    assert content(store) == content(whole)


@pytest.mark.parametrize("text", ["0/3", "4/3", "3", "a/b"])
def test_a_shard_that_cannot_be_is_named(text) -> None:
    with pytest.raises(PromptError, match=f"a shard is written NUMBER/OF .* got '{text}'"):
        Shard.parse(text)


def content(store: LabelStore) -> list[tuple[object, ...]]:
    """Everything but what it cost."""
    with sqlite3.connect(store.path) as connection:
        return sorted(connection.execute("SELECT model, prompt, plan, decoding, judge, answer, score FROM labels"))


def _no_kind(content: bytearray, page: int) -> None:
    content[page] = 0x7F  # the kind of a page, which no page has


def _torn_key(content: bytearray, page: int) -> None:
    content[content.index(b"p1500exact") + 1] ^= 1 << 3  # which now lies behind keys that are larger


@pytest.mark.parametrize("tear", [_no_kind, _torn_key])
def test_a_torn_store_is_refused_although_other_labels_can_be_read(tmp_path, tear) -> None:
    store = LabelStore(tmp_path / "labels.db")
    store.add([label(n) for n in range(2000)])
    with sqlite3.connect(store.path) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        (size,) = connection.execute("PRAGMA page_size").fetchone()
    content = bytearray(store.path.read_bytes())
    tear(content, (len(content) // size - 2) * size)
    store.path.write_bytes(content)
    with pytest.raises(StoreError, match=r"is damaged .* put a copy in its place, or remove it"):
        LabelStore(tmp_path / "labels.db")
    with pytest.raises(StoreError, match="is damaged"):
        LabelStore(tmp_path / "labels.db", read_only=True)


def test_stores_are_merged_without_doubles(tmp_path) -> None:
    first, second = LabelStore(tmp_path / "first.db"), LabelStore(tmp_path / "second.db")
    first.add([label(1, score=0.25), label(2)])
    second.add([label(1, score=0.75), label(3)])
    assert first.merge(second.path) == 1
    assert first.merge(second.path) == 0
    assert first.keys("m", "0-5", "d") == {("p1", "exact"), ("p2", "exact"), ("p3", "exact")}
    assert first.read("m", "0-5", "d")["p1", "exact"].score == 0.25
    with pytest.raises(StoreError, match="there is no label store"):
        first.merge(tmp_path / "third.db")


def test_labels_go_through_parquet_and_datasets(tmp_path) -> None:
    store, copy = LabelStore(tmp_path / "labels.db"), LabelStore(tmp_path / "copy.db")
    store.add([label(1), label(2, score=float("nan"), answer_ids=())])
    store.to_parquet(tmp_path / "labels.parquet")
    copy.add_parquet(tmp_path / "labels.parquet")
    assert content(copy) == content(store)
    found = copy.read("m", "0-5", "d")
    assert found["p1", "exact"] == label(1)
    assert np.isnan(found["p2", "exact"].score)
    rows = datasets.load_dataset("parquet", data_files=str(tmp_path / "labels.parquet"), split="train")
    assert rows["answer_ids"][0] == [7, 2]


WRITER = """
import sys
from pathlib import Path
from oracle.labels.store import LabelStore
sys.path.insert(0, {tests!r})
from oracle_labels import label
store = LabelStore(Path(sys.argv[1]))
for batch in range(10_000):
    store.add([label(batch * 8 + i) for i in range(8)])
    print(batch, flush=True)
"""


def test_kills_lose_no_acknowledged_label_and_double_none(tmp_path) -> None:
    path, acknowledged, draw = tmp_path / "labels.db", 0, random.Random(0)
    (tmp_path / "oracle_labels.py").write_text(Path(__file__).read_text())
    program = WRITER.format(tests=str(tmp_path))
    for _ in range(4):
        writer = subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE, text=True)
        assert writer.stdout is not None
        writer.stdout.readline()
        time.sleep(draw.uniform(0.02, 0.3))
        writer.send_signal(signal.SIGKILL)
        lines = writer.stdout.read().splitlines()
        acknowledged = max([acknowledged, *(8 * (int(line) + 1) for line in lines[:-1])])
        writer.wait()
        store = LabelStore(path)
        found = [found.prompt for found in store.read("m", "0-5", "d").values()]
        assert len(found) == len(set(found)) >= acknowledged
        assert len(found) % 8 == 0, "a transaction was torn"


def test_a_label_stays_as_it_was_first_stored(tmp_path) -> None:
    store = LabelStore(tmp_path / "labels.db")
    store.add([label(1, score=0.25)])
    store.add([label(1, score=0.75), label(2)])
    assert store.read("m", "0-5", "d")["p1", "exact"].score == 0.25
    assert len(store) == 2


def test_files_that_are_no_store_are_refused(tmp_path) -> None:
    (tmp_path / "text.db").write_text("not a database, but long enough to be looked at as one" * 20)
    with pytest.raises(StoreError, match="cannot use the label store"):
        LabelStore(tmp_path / "text.db")
    with sqlite3.connect(tmp_path / "newer.db") as connection:
        connection.execute("PRAGMA user_version=9")
    with pytest.raises(StoreError, match="has label format 9, this version reads 2"):
        LabelStore(tmp_path / "newer.db")


def test_stop_strings_end_texts_and_tokens(tokenizer) -> None:
    stops = stop_token_ids(tokenizer, Decoding(1, ("\n",)))
    assert stops == {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("\n")}
    assert cut_at_stop(" a b\nc", ["\n"]) == "a b"
    assert cut_at_stop(" a b\nc", []) == "a b\nc"


def test_answers_stop_at_the_stop_string(model, tokenizer) -> None:
    free = answer_batch(model, tokenizer, ["abc"], LayerPlan.full(6), Decoding(6))[0]
    stop = free.text[1]
    cut = answer_batch(model, tokenizer, ["abc"], LayerPlan.full(6), Decoding(6, (stop,)))[0]
    first = free.text.index(stop)
    assert cut.text == free.text[:first].strip()
    assert cut.token_ids == free.token_ids[: first + 1]


def test_scores_are_a_matrix_in_menu_order() -> None:
    np.testing.assert_array_equal(score_matrix([[label(1, score=0.5), label(1)]]), [[0.5, 1.0]])
