"""The split `calibrate`: labelled where prices choose, and a bound that is broken as seldom as promised."""

import json
import pickle
import shutil
import sqlite3
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import certificates
import numpy as np
import pytest
import yaml
from prices import price_of
from redraws import price_on
from scipy.stats import binom
from tiny_run import tiny_settings, write_prompts

from controller.base import ChoiceRule
from controller.certificate.calibration import PricePath, choices, on_path, valid_price
from controller.certificate.certificate import PLAN_SHARE
from controller.certificate.risks import CalibrationError
from oracle.labels.reader import judged
from oracle.labels.store import LabelStore
from oracle.prompts import Prompt
from pipelines.config import load_config
from pipelines.config.learning_sections import CalibrationSection
from pipelines.evaluation.learning_table import Table, groups_of
from pipelines.run.model import RunModel
from pipelines.run.runner import run_one
from pipelines.run.workspace import Workspace
from pipelines.stages import calibrate
from pipelines.stages.label import label_cells

MENUS = {
    "gaps": ["0-1", "0-1,5", "0-2,5", "0-3,5", "0-1,3-5", "0-4"],
    "exits": ["0-1", "0-2", "0-3", "0-4"],
    "nested": ["0-1", "0-2,5", "0-2,4-5"],
}
MOST = 0.5
"""Share of the labels on the path, where there are several plans; measured .29 to .37."""
STORED = "model, prompt, plan, decoding, judge, answer, answer_ids, score"
BUDGETS = np.linspace(0.5, 1, 6)
RULE = ChoiceRule(BUDGETS, "mean_score")


@pytest.fixture(scope="module", params=MENUS)
def trained(request, model_folder, tmp_path_factory) -> Path:
    """The configuration of a run whose controllers are trained; no prompt to calibrate is labelled."""
    folder = tmp_path_factory.mktemp(request.param)
    settings = tiny_settings(folder, model_folder, write_prompts(folder / "prompts.jsonl"))
    settings |= {
        "menu": {"method": "given", "given": MENUS[request.param], "probe_depth": 1},
        "tuning": {"controllers": ["lightgbm", "logistic", "mlp"], "components": [4], "folds": 2},
        "label": {"batch_size": 4},
        "data": settings["data"]
        | {"shares": {"adapt": 0.1, "train": 0.35, "tune": 0.15, "calibrate": 0.25, "test": 0.15}},
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(settings))
    for stage in ("menu", "adapt", "label", "features", "tune", "train"):
        run_one(load_config(folder / "tiny.yaml"), stage)
    return folder / "tiny.yaml"


def copied(trained: Path, folder: Path, best: str) -> Workspace:
    """The same run elsewhere, in which another controller has won."""
    shutil.copytree(trained.parent / "runs", folder / "runs")
    config = load_config(trained).model_copy(update={"runs": folder / "runs"})
    tuning = json.loads((config.folder / "tuning.json").read_text())
    (config.folder / "tuning.json").write_text(json.dumps(tuning | {"best": best}))
    return Workspace(config)


def certificate_of(workspace: Workspace, **options) -> dict:
    calibrate.run(workspace, **options)
    return json.loads(workspace.path("calibration.json").read_text())


def labels_to_calibrate(workspace: Workspace) -> list[tuple]:
    hashes = {prompt.hash for prompt in workspace.prompts.labelled("calibrate")}
    with sqlite3.connect(workspace.path("labels.db")) as store:
        return sorted(row for row in store.execute(f"SELECT {STORED} FROM labels") if row[1] in hashes)


@pytest.mark.parametrize("best", ["lightgbm", "logistic", "mlp"])
def test_labels_on_the_path_make_the_certificate_of_all_labels(trained, best, tmp_path) -> None:
    part, full = (copied(trained, tmp_path / name, best) for name in ("part", "full"))
    assert labels_to_calibrate(part) == []
    cells = np.ones((len(full.prompts.labelled("calibrate")), len(full.menu())), dtype=np.bool_)
    label_cells(full, "calibrate", cells, None)
    assert len(labels_to_calibrate(full)) == cells.sum()
    found, expected = certificate_of(part), certificate_of(full)
    assert found == expected
    assert found["certificate"]["price"] is not None, "an empty certificate would be equal, too"
    some, every = ({(*row[:3], row[-1]) for row in labels_to_calibrate(run)} for run in (part, full))
    assert some < every, "answers may be cut short elsewhere, scores are the same"
    assert len(every) == cells.sum(), "and nothing is labelled twice"
    assert len(some) <= MOST * len(every) or len(part.menu()) < len(MENUS["gaps"]), "fewer plans, less to leave out"


class Elsewhere:
    """A worker that shares nothing with this process."""

    def map(self, task, pieces):
        for number, piece in enumerate(pieces):
            yield number, pickle.loads(pickle.dumps(task))(pickle.loads(pickle.dumps(piece)))


@pytest.mark.parametrize("trained", ["gaps"], indirect=True)
def test_a_stop_while_labelling_to_calibrate_loses_nothing(trained, tmp_path) -> None:
    whole, stopped, shared = (copied(trained, tmp_path / name, "mlp") for name in ("whole", "stopped", "shared"))
    expected, add, added = certificate_of(whole), LabelStore.add, []

    def add_twice(store: LabelStore, labels) -> None:
        if len(added) == 2:
            raise KeyboardInterrupt
        add(store, labels)
        added.append(len(labels))

    with patch.object(LabelStore, "add", add_twice), pytest.raises(KeyboardInterrupt):
        certificate_of(stopped)
    assert 0 < len(labels_to_calibrate(stopped)) == sum(added) < len(labels_to_calibrate(whole))
    assert not stopped.path("calibration.json").exists()
    assert certificate_of(stopped) == expected
    assert labels_to_calibrate(stopped) == labels_to_calibrate(whole)
    assert certificate_of(shared, workers=Elsewhere()) == expected
    assert labels_to_calibrate(shared) == labels_to_calibrate(whole)
    with patch.object(RunModel, "loaded", property(lambda self: pytest.fail("the model was loaded"))):
        assert certificate_of(whole) == expected


def predictions(n: int) -> np.ndarray:
    """Every second plan is expected to lose more than a cheaper one; the last prompt is an outlier."""
    losses = np.linspace(0.4, 0, 6) * np.random.default_rng(0).uniform(0.2, 1, (n, 1))
    losses[:, 1:-1:2] += 0.4
    losses[-1, :-1] = np.nan
    return losses.astype(np.float32)


def test_half_of_the_labels_lie_on_the_path_where_plans_are_poor() -> None:
    cells = on_path(predictions(40), RULE)
    assert cells[:, -1].all()
    assert not cells[:, 1:-1:2].any()
    assert cells[-1].sum() == 1
    assert len(BUDGETS) * 40 / 6 <= cells.sum() <= len(BUDGETS) * 40 / 2


@pytest.mark.parametrize("unknown", [np.nan, -9.0, 9.0])
def test_losses_off_the_path_are_not_read(unknown: float) -> None:
    predicted, losses = predictions(40), np.random.default_rng(1).random((40, 6))
    cells = on_path(predicted, RULE)
    expected = PricePath.of(predicted, losses, RULE)
    found = PricePath.of(predicted, np.where(cells, losses, unknown), RULE, cells)
    np.testing.assert_array_equal(found.losses, expected.losses)
    np.testing.assert_array_equal(found.shortens, expected.shortens)


def test_a_price_that_chooses_an_unlabelled_plan_is_refused() -> None:
    predicted = predictions(40)
    cells = on_path(predicted, RULE)
    cells[[3, 5], 0] = False
    with pytest.raises(CalibrationError, match="2 of 40 prompts lack labels"):
        PricePath.of(predicted, np.zeros((40, 6)), RULE, cells)


def test_a_table_keeps_which_scores_are_known() -> None:
    prompts = [Prompt(str(row), "a", str(row), "", "exact") for row in range(3)]
    scores = np.array([[0.5, 1.0], [0.0, np.nan], [0.0, 0.4]])
    labelled = np.array([[True, True], [False, True], [False, True]])
    table = Table.of(prompts, scores, {}, np.array([0.5, 1.0]), "mean_score", labelled=labelled)
    np.testing.assert_array_equal(table.labelled, [[True, True], [False, True]])
    np.testing.assert_array_equal(table.rows(np.array([1])).labelled, [[False, True]])
    assert replace(table, labelled=None).rows(np.array([1])).labelled is None


def plans_table(kept: tuple[float, ...], n: int = 300) -> Table:
    """Prompts that two plans, of .3 and .6 of the decoder, answer so much more or less often than the full model."""
    random = np.random.default_rng(0)
    full = (random.random(n) < 0.5).astype(float)
    own = [np.where(random.random(n) < 0.4, random.random(n) < 0.5 + 0.5 * (one - 1) / 0.4, full) for one in kept]
    prompts = [Prompt(str(row), "a", str(row), "", "exact") for row in range(n)]
    return Table.of(prompts, np.column_stack([*own, full]), {}, np.array([0.3, 0.6, 1.0]), "mean_score")


@pytest.mark.parametrize(
    ("kept", "price", "keep", "plan"),
    [
        pytest.param((0.6, 1.4), None, 1.0, 1, id="no price is valid, a plan is"),
        pytest.param((0.6, 1.4), 0.01, 1.0, None, id="a price that runs less"),
        pytest.param((0.6, 1.4), 1000.0, 1.0, 1, id="a price that runs more"),
        pytest.param((1.4, 1.4), 1000.0, 1.05, 0, id="the cheaper of two valid plans"),
        pytest.param((1.4, 0.6), None, 1.05, None, id="a plan behind one that fails is not tested"),
        pytest.param((0.6, 0.7), None, 0.97, None, id="no plan is valid"),
    ],
)
def test_one_plan_for_all_stands_in_for_a_price(kept, price, keep, plan) -> None:
    fit, settings = plans_table(kept), CalibrationSection(keep=[keep], delta=0.1)
    expected = np.tile(np.float32([0.2, 0.1, 0.0]), (50, 1))
    rule = calibrate.rule_at(fit.rule, expected, price, calibrate.plan_for_all(fit, settings, keep))
    assert rule.plan == plan
    if plan is not None:
        np.testing.assert_array_equal(rule.choose(expected, price), plan)
        found = calibrate.certified_plan(plan, fit, keep=keep, delta=0.1, share=PLAN_SHARE, risk="mean_score")
        assert (found.plan, found.n, found.price is None) == (plan, 300, False)
        assert "Every prompt runs the same plan" in found.sentence
        assert found.observed_risk == pytest.approx(fit.losses[:, plan].mean() / fit.unit)


DELTA = certificates.DELTA
FAILED = float("nan")


@pytest.mark.parametrize(
    ("scores", "rows", "known"),
    [
        ([[0.5, 1.0], [0.2, 0.4]], [0, 1], [[0.5, 1.0], [0.2, 0.4]]),
        ([[FAILED, 1.0], [0.2, 0.4]], [0, 1], [[0.0, 1.0], [0.2, 0.4]]),
        ([[0.5, FAILED], [0.2, 0.4]], [1], [[0.2, 0.4]]),
        ([[FAILED, FAILED]], [], np.zeros((0, 2))),
    ],
)
def test_an_answer_that_no_judge_reads_scores_zero(scores, rows, known) -> None:
    found = judged(np.array(scores))
    np.testing.assert_array_equal(found[0], rows)
    np.testing.assert_array_equal(found[1], known)
    prompts = [Prompt(str(row), "a", str(row), "", "exact") for row in range(len(scores))]
    features = {"length": np.zeros((len(scores), 1), np.float32)}
    table = Table.of(prompts, np.array(scores), features, np.array([0.5, 1.0]), "mean_score")
    assert [prompt.id for prompt in table.prompts] == [str(row) for row in rows]
    assert table.left_out == len(scores) - len(rows)
    np.testing.assert_array_equal(table.scores, known)


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        ([("a", None), ("b", None), ("c", None)], 3),
        ([("a", None), ("b", None), ("a", None)], 2),
        ([("a", "x"), ("b", "x"), ("c", "y")], 2),
        ([("a", "x"), ("a", "y"), ("b", "y"), ("c", None)], 2),
        ([("a", "x"), ("b", "y"), ("b", "x")], 1),
        ([("a", ""), ("b", "")], 2),
    ],
)
def test_prompts_of_one_group_or_of_one_text_go_together(prompts, expected) -> None:
    found = groups_of([SimpleNamespace(prompt=text, group=group) for text, group in prompts])
    assert len(set(found.tolist())) == expected


rare = certificates.rare_loss
failing, grouped, many = (
    partial(rare, **how)
    for how in ({"rate": 0.2, "score": FAILED}, {"rate": 0.4, "copies": 8}, {"rate": 0.2, "controllers": 6})
)
CASES = [
    certificates.Case("judge fails", failing, (0.03,), n=150, wrong=certificates.without_failures),
    certificates.Case("groups of eight", grouped, (0.2,), "score_lost", 240, wrong=certificates.each_apart),
    certificates.Case("best of six controllers", many, (0.1,), "score_lost", 60, wrong=lambda table: table),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_bound_is_broken_as_seldom_as_promised(case) -> None:
    """And the wrong way to calibrate the same draws breaks it more often."""
    repetitions = 20 if case.name == "judge fails" else 60
    row, most = certificates.measured(case, repetitions), binom.ppf(0.99, repetitions, DELTA) / repetitions
    assert row["certified"] > 0.7, "the bound is useless if it is never reached"
    assert row["broken"] <= most < row["broken_wrong_way"]


def test_prices_shown_together_share_delta_and_every_draw_counts() -> None:
    table = certificates.cases()[0].draw(np.random.default_rng(0), 300).table("mean_score")
    predicted, settings = table.features["0"], CalibrationSection(keep=0.95, delta=0.1)
    path = PricePath.of(predicted, table.losses, table.rule)
    alone, together, looser = (
        price_of(predicted, table, settings, **terms) for terms in ({}, {"together": 4}, {"keep": 0.92, "together": 4})
    )
    assert together == valid_price(path, 0.05, 0.025, risk="mean_score", full=table.full)
    assert None not in (alone, together, looser)
    assert looser < alone < together
    chosen = choices(predicted, table.rule)  # in redraws a prompt that is drawn twice is two draws, though of one text
    once, often = (price_on(np.tile(np.arange(300), times), chosen, table, settings, 0.95) for times in (1, 30))
    assert often < once == alone


def test_the_simulations_are_written_as_a_table(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(certificates, "RESULTS", tmp_path)
    monkeypatch.setattr(certificates, "POPULATION", 2000)
    monkeypatch.setattr(sys, "argv", ["certificates.py", "--repetitions", "2"])
    certificates.main()
    rows = json.loads((tmp_path / "certificates.json").read_text())["rows"]
    assert [row["case"] for row in rows] == [case.name for case in certificates.cases()]
    assert "| judge fails on 20% |" in capsys.readouterr().out
