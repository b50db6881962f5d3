"""Allocators from somebody who knows how digests are made: refused in one sentence, in a process that lives on."""

import multiprocessing
from dataclasses import replace
from pathlib import Path

import numpy as np
from chat_templates import WITH_BEGIN, chat_tokenizer
from child import _IMPORTED, _environment
from forgeries import run_table
from outcome import GOOD
from tiny import padded_batch, tiny_model
from tiny_allocator import SETS, make_allocator, with_healing

from backbone.errors import InputError
from controller.certificate.drift import DriftAlarm, drift_scores
from controller.certificate.outliers import OutlierTest
from controller.features import prompt_features
from controller.models.gbdt import LightGBMController
from oracle.chat import ChatTemplate
from runtime.allocator import Allocator
from runtime.chat_format import ChatFormat
from runtime.saving.allocator_checks import optional_parts

FEWEST_CASES, TIME_LIMIT_S = 400, 60
REFUSED, UNDAMAGED = "refused in one sentence", {"trees, undamaged", "every part, undamaged"}


def save_bases(folder: Path) -> dict[str, Path]:
    """An allocator with trees, and one that has every part."""
    model, batch, tokenizer = tiny_model("llama"), padded_batch(), chat_tokenizer()
    trees = make_allocator(model, controller=LightGBMController(n_trees=8, min_leaf_rows=5), name="lightgbm")
    made, features = with_healing(model), prompt_features(model, batch["input_ids"], batch["attention_mask"], 2, SETS)
    many = {name: np.repeat(rows, 10, axis=0) for name, rows in features.items()}
    template = ChatTemplate(WITH_BEGIN, {"bos_token": str(tokenizer.bos_token)})
    whole = replace(
        made,
        outliers=OutlierTest.fit(many, many, ("states",), 0.1),
        drift=DriftAlarm(drift_scores(made.projection(many), np.full(40, made.menu.budgets[0]))),
        chat=ChatFormat.of(template, tokenizer, for_all=False),
        acceptance=(0.5, 0.75, 1.0),
    )
    assumed = {"assumes": optional_parts(whole), "decoding": str(whole.decoding), "chat_template": template.hash}
    whole = replace(whole, certificate=replace(whole.certificate, **assumed))
    trees.save_pretrained(folder / "trees")
    whole.save_pretrained(folder / "whole")
    return {"trees": folder / "trees", "every part": folder / "whole"}


class Check:
    """What comes of loading an allocator and generating with it."""

    def __init__(self, bases: dict[str, Path]) -> None:
        self._model, self._tokenizer = tiny_model("llama"), chat_tokenizer()
        self._before = {owner: self._answers(place) for owner, place in bases.items()}

    def _answers(self, place: Path) -> list[object]:
        loaded = Allocator.from_pretrained(place)
        text = loaded.rendered(self._tokenizer, "abc")
        return [text, loaded.allocate(self._model, **padded_batch()), str(loaded.certificate), str(loaded.decoding)]

    def __call__(self, place: Path, owner: str) -> str:
        try:
            answers = self._answers(place)
        except InputError as error:
            return REFUSED if "\n" not in str(error) else f"traceback: {error}"
        except Exception as error:
            return f"traceback: {error!r:.300}"
        return "harmless and correct" if answers == self._before.get(owner, answers) else "accepted damage"


def forge_and_check(folder: Path, told) -> None:
    bases = save_bases(folder)
    run_table(folder, bases, Check(bases), told)


def test_forged_artefacts_are_refused(tmp_path, record_property) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTED)
    heard, told = context.Pipe(duplex=False)
    child = context.Process(target=forge_and_check, args=(tmp_path, told), daemon=True)
    with _environment():
        child.start()
    told.close()
    outcomes: dict[str, str] = {}
    name = "saving"
    try:
        while heard.poll(TIME_LIMIT_S):
            name = heard.recv()
            outcomes[name] = "hang"
            if heard.poll(TIME_LIMIT_S):
                outcomes[name] = heard.recv()
    except EOFError:
        child.join(TIME_LIMIT_S)
        if child.exitcode:
            outcomes[name] = f"death with status {child.exitcode}"
    finally:
        child.kill()
    for outcome in outcomes.values():
        record_property("outcome", outcome.partition(":")[0])
    assert {name: outcome for name, outcome in outcomes.items() if outcome not in GOOD} == {}
    assert {name for name, outcome in outcomes.items() if outcome != REFUSED and ", seed" not in name} == UNDAMAGED
    assert len(outcomes) >= FEWEST_CASES
