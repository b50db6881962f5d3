import random
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from backbone.families import sublayer_bytes
from backbone.plan import LayerPlan, PlanMenu
from oracle.answering import answer_batch, stop_token_ids
from oracle.decoding import Decoding, cut_at_stop
from oracle.judges import JudgeError
from oracle.labelling import Labeller, score_matrix
from oracle.labels import Label, LabelStore, StoreError
from oracle.prompts import Prompt

DECODING = Decoding(4)
PROMPTS = [Prompt(f"p{i}", "t", "abcdefgh"[: i % 7 + 1] + str(i), "", "agreement") for i in range(11)]


def menu_of(model) -> PlanMenu:
    return PlanMenu.build([LayerPlan.skipping(6, {4}), LayerPlan.exiting(6, 3)], sublayer_bytes(model), probe_depth=2)


def label(number: int, **changes) -> Label:
    values = {"model": "m", "prompt": f"p{number}", "plan": "0-5", "decoding": "d", "judge": "exact", "answer": "a"}
    return Label(**{**values, "score": 1.0, "prompt_tokens": 3, "answer_tokens": 2, "seconds": 0.1, **changes})


def test_labels_equal_generating_each_prompt_alone(model, tokenizer, tmp_path) -> None:
    menu, steps = menu_of(model), []
    labeller = Labeller(model, tokenizer, DECODING, LabelStore(tmp_path / "labels.db"), batch_size=4)
    labeller.label(PROMPTS, menu, steps.append)
    assert sum(steps) == len(PROMPTS) * len(menu)
    labels = labeller.read(PROMPTS, menu)
    for prompt, row in zip(PROMPTS, labels, strict=True):
        answers = [answer_batch(model, tokenizer, [prompt.prompt], plan, DECODING)[0] for plan in menu.plans]
        assert [found.answer for found in row] == [answer.text for answer in answers]
        assert [found.score for found in row] == [float(answer.text == answers[-1].text) for answer in answers]
        assert row[0].prompt_tokens == len(prompt.prompt)
    scores = score_matrix(labels)
    assert scores.shape == (11, 3)
    assert (scores[:, -1] == 1).all()


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


def test_a_judge_that_fails_names_the_prompt(model, tokenizer, tmp_path, monkeypatch) -> None:
    (tmp_path / "broken_judge.py").write_text("def judge(answer, reference, full):\n    raise OSError('no disk')\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    prompts = [Prompt("p0", "t", "abc", "", "broken_judge:judge")]
    labeller = Labeller(model, tokenizer, DECODING, LabelStore(tmp_path / "labels.db"), 4)
    with pytest.raises(JudgeError, match="'broken_judge:judge' failed on prompt 'p0': no disk"):
        labeller.label(prompts, menu_of(model))


WRITER = """
import sys
from pathlib import Path
from oracle.labels import LabelStore
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
    with pytest.raises(StoreError, match="has label format 9, this version reads 1"):
        LabelStore(tmp_path / "newer.db")


def test_stop_strings_end_texts_and_tokens(tokenizer) -> None:
    stops = stop_token_ids(tokenizer, ("\n",))
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
