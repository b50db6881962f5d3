"""The stage `calibrate` keeps its promise where judges fail, prompts repeat, or a choice is made afterwards."""

import importlib
import json
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.stats import binom

from controller.certificate.calibration import PricePath, valid_price
from oracle.labels.reader import judged
from oracle.prompts import Prompt
from pipelines.config.learning_sections import CalibrationSection
from pipelines.evaluation.learning_table import Table, groups_of
from pipelines.stages.calibrate import price_of

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
certificates = importlib.import_module("certificates")

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
CASES = [
    certificates.Case(
        "judge fails", partial(rare, rate=0.2, score=FAILED), (0.03,), n=150, wrong=certificates.without_failures
    ),
    certificates.Case(
        "groups of eight", partial(rare, rate=0.4, copies=8), (0.2,), "score_lost", 240, wrong=certificates.each_apart
    ),
    certificates.Case(
        "best of six controllers",
        partial(rare, rate=0.2, controllers=6),
        (0.1,),
        "score_lost",
        60,
        wrong=lambda table: table,
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_bound_is_broken_as_seldom_as_promised(case) -> None:
    """And the wrong way to calibrate the same draws breaks it more often."""
    repetitions = 20 if case.name == "judge fails" else 60
    row, most = certificates.measured(case, repetitions), binom.ppf(0.99, repetitions, DELTA) / repetitions
    assert row["certified"] > 0.7, "the bound is useless if it is never reached"
    assert row["broken"] <= most < row["broken_wrong_way"]


def test_prices_that_are_shown_together_share_delta() -> None:
    case = certificates.cases()[0]
    table = case.draw(np.random.default_rng(0), 300).table(case.risk)
    predicted, settings = table.features["0"], CalibrationSection(keep=0.95, delta=0.1)
    path = PricePath.of(predicted, table.losses, table.budgets)
    alone, together, looser = (
        price_of(predicted, table, settings, **terms) for terms in ({}, {"together": 4}, {"keep": 0.92, "together": 4})
    )
    assert together == valid_price(path, 0.05, 0.025, risk="mean_score", full=table.full)
    assert alone is not None
    assert together is not None
    assert looser is not None
    assert looser < alone < together


def test_the_simulations_are_written_as_a_table(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(certificates, "RESULTS", tmp_path)
    monkeypatch.setattr(certificates, "POPULATION", 2000)
    monkeypatch.setattr(sys, "argv", ["certificates.py", "--repetitions", "2"])
    certificates.main()
    rows = json.loads((tmp_path / "certificates.json").read_text())["rows"]
    assert [row["case"] for row in rows] == [case.name for case in certificates.cases()]
    assert "| judge fails on 20% |" in capsys.readouterr().out
