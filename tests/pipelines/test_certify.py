"""`layerbudget certify` on a tiny model: a new certificate from later prompts, and prompts that give none."""

import json
import random
import shutil
from contextlib import chdir
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from command import layerbudget, refused, snapshot
from tiny_run import tiny_settings, write_prompts

from controller.learning import FittedPredictor
from layerbudget import Allocator
from oracle.labels.labeller import Labeller
from oracle.labels.store import LabelStore

BEFORE_CERTIFYING = ("menu", "adapt", "label", "features", "tune", "train", "calibrate")


def later(path: Path, n: int = 150, seed: int = 1) -> Path:
    """Prompts like those of `write_prompts` that no run has seen."""
    draw = random.Random(seed)
    texts = ["".join(draw.choices("abcdefgh", k=(20, 7)[number % 2])) for number in range(n)]
    rows = [{"id": f"later-{i}", "task": "long", "prompt": text, "judge": "agreement"} for i, text in enumerate(texts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def project(model_folder, tmp_path_factory):
    """A folder with a run that has its allocator, at two levels."""
    folder = tmp_path_factory.mktemp("certify")
    write_prompts(folder / "prompts.jsonl")
    settings = tiny_settings(Path(), model_folder, Path("prompts.jsonl"))
    settings |= {"calibration": {"keep": [0.7, 0.6], "delta": 0.4}, "adapt": {"method": "bridges"}}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(settings))
    with chdir(folder):
        for stage in BEFORE_CERTIFYING:
            done = layerbudget(stage, "tiny.yaml")
            assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture
def allocator(project, tmp_path, monkeypatch) -> Path:
    shutil.copytree(project, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("LAYERBUDGET_CACHE", str(tmp_path / "cache"))
    return Path("runs/tiny/allocator")


def certify(allocator: Path, prompts: Path, *more: object):
    return layerbudget("certify", allocator, "--prompts", prompts, "--device", "cpu", *more)


def test_a_certificate_is_made_anew_from_later_prompts(allocator) -> None:
    old = Allocator.from_pretrained(allocator)
    done = certify(allocator, later(Path("later.jsonl")))
    assert done.returncode == 0, done.stdout + done.stderr
    new = Allocator.from_pretrained(allocator)
    assert (new.certificate.n, new.certificate.levels) == (150, (0.7, 0.6))
    assert new.certificate.prompts_hash != old.certificate.prompts_hash
    assert new.certificate.assumes == old.certificate.assumes
    assert new.drift.false_alarm_rate == old.drift.false_alarm_rate
    assert len(new.drift.reference_scores) == 150
    assert (new.menu, new.decoding, new.chat) == (old.menu, old.decoding, old.chat)
    assert new.certificate.sentence in done.stdout
    assert old.certificate.sentence in done.stdout
    kept = json.loads((allocator / f"certificate-{old.certificate.date}.json").read_text())
    assert kept["prompts_hash"] == old.certificate.prompts_hash
    again = refused("certify", allocator, "--prompts", "later.jsonl")
    assert "150 of 150 prompts were used for this allocator before, the first is 'later-0'" in again


def test_a_certification_predicts_once_and_leaves_out_what_no_judge_read(allocator, monkeypatch) -> None:
    predicted, predict, scores = [], FittedPredictor.predict, Labeller.scores

    def failing(labeller, prompts, plan):
        found = scores(labeller, prompts, plan)
        return np.where([plan.is_full and prompt.id == "later-3" for prompt in prompts], np.nan, found)

    monkeypatch.setattr(FittedPredictor, "predict", lambda self, some: predicted.append(1) or predict(self, some))
    monkeypatch.setattr(Labeller, "scores", failing)
    done = certify(allocator, later(Path("later.jsonl")))
    assert done.returncode == 0, done.stdout + done.stderr
    new = Allocator.from_pretrained(allocator)
    assert (new.certificate.n, new.certificate.left_out) == (149, 1)
    assert len(new.drift.reference_scores) == 149
    assert len(predicted) == 1


def test_a_certification_goes_on_and_saves_elsewhere(allocator, monkeypatch) -> None:
    prompts, before, added = later(Path("later.jsonl")), snapshot(allocator), []
    add, new = LabelStore.add, allocator.with_name("new")

    def stopping(store, labels) -> None:
        if len(added) == 2:
            raise RuntimeError("killed")
        added.append(len(labels))
        add(store, labels)

    monkeypatch.setattr(LabelStore, "add", stopping)
    with pytest.raises(RuntimeError, match="killed"):
        certify(allocator, prompts, "--out", new)
    first = sum(added)
    monkeypatch.setattr(LabelStore, "add", lambda store, labels: (added.append(len(labels)), add(store, labels)))
    done = certify(allocator, prompts, "--out", new)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "restores the old certificate" not in done.stdout
    assert snapshot(allocator) == before
    assert Allocator.from_pretrained(new).certificate.n == 150
    assert len(list(new.glob("certificate-????-??-??.json"))) == 1
    store = LabelStore(new.with_name("new-certify") / "labels.db", read_only=True)
    assert 0 < first < sum(added) == len(store)


def test_a_bound_that_does_not_hold_saves_nothing(allocator) -> None:
    """Nobody scores more than the full model by agreement with it."""
    old = Allocator.from_pretrained(allocator)
    more = replace(old.certificate, keep=1.2, levels=())
    replace(old, certificate=more, others=()).save_pretrained(allocator)
    before, prompts = snapshot(allocator), later(Path("later.jsonl"))
    done = certify(allocator, prompts)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Not certified" in done.stdout
    assert "Nothing is saved" in done.stdout
    assert snapshot(allocator) == before
    assert "were used for this allocator before" in refused("certify", allocator, "--prompts", prompts)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"prompts": "prompts.jsonl"}, "160 of 160 prompts were used for this allocator before"),
        ({"n": 2}, "there are 2 prompts; keep=0.6 at delta 0.2 takes"),
        ({"out": "~/tiny.yaml"}, "--out ~/tiny.yaml is a file; name a folder"),
        ({"moved": "elsewhere"}, "holds the prompts of the allocator's own certificate"),
    ],
    ids=["seen", "few", "file", "own"],
)
def test_prompts_that_certify_nothing_are_refused(allocator, change, sentence) -> None:
    prompts, before = later(Path("later.jsonl"), change.get("n", 150)), snapshot(allocator)
    if "moved" in change:  # where nothing is known of the run
        assert certify(allocator, prompts, "--out", "elsewhere/allocator").returncode == 0
        shutil.rmtree("elsewhere/allocator-certify")
        allocator, before = Path("elsewhere/allocator"), snapshot(Path("elsewhere/allocator"))
    out = ("--out", change["out"]) if "out" in change else ()
    assert sentence in refused("certify", allocator, "--prompts", change.get("prompts", prompts), *out)
    assert snapshot(allocator) == before


def test_a_plan_that_was_certified_for_all_is_tested_again(allocator) -> None:
    old = Allocator.from_pretrained(allocator)
    planned = replace(old.certificate, plan=len(old.menu) - 2)
    replace(old, certificate=planned).save_pretrained(allocator)
    done = certify(allocator, later(Path("later.jsonl")))
    assert done.returncode == 0, done.stdout + done.stderr
    assert planned.sentence in done.stdout
    levels = Allocator.from_pretrained(allocator)
    new = levels.at(planned.keep).certificate
    assert (new.plan, new.n) == (planned.plan, 150)
