"""Controls know less than the controller, and the report says so when the controller knows nothing."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from controller.certificate.risks import quality_kept
from controller.learning import Settings
from oracle.prompts import Prompt
from pipelines.config import load_config
from pipelines.controls import _knows_the_prompt, control_features, control_settings
from pipelines.learning_table import Table
from pipelines.settings_search import Work, regret_bounds
from pipelines.unseen_tasks import TESTED, UNTESTED, unseen_tasks

ROOT = Path(__file__).parents[2]


def table(n: int, seed: int) -> Table:
    """The first state decides what the shortened plan keeps, whatever the task."""
    random = np.random.default_rng(seed)
    states = random.normal(size=(n, 6)).astype(np.float32)
    scores = np.column_stack([np.clip(states[:, 0] + 0.5, 0, 1), np.ones(n)])
    prompts = [Prompt(str(i), "abc"[i % 3], f"text {i}", "", "kl") for i in range(n)]
    features = {"states": states, "length": random.normal(size=(n, 1)).astype(np.float32)}
    return Table(prompts, features, scores, scores >= 1, scores, np.array([0.5, 1.0]), "score_lost")


def test_the_loss_is_what_the_certificate_bounds() -> None:
    scores = np.array([[0.2, 0.9, 0.6], [0.6, 0.5, 0.6]])
    sufficient = scores >= scores[:, -1:]
    np.testing.assert_allclose(quality_kept("score_lost", scores, sufficient), [[0.6, 1, 1], [1, 0.9, 1]])
    np.testing.assert_allclose(quality_kept("mean_score", scores, sufficient), [[0.3, 0.65, 0.5], [0.5, 0.45, 0.5]])
    np.testing.assert_array_equal(quality_kept("insufficient", scores, sufficient), [[0, 1, 1], [1, 0, 1]])


def test_controls_see_what_they_are_named_after() -> None:
    some = table(30, 0)
    shuffled, sets = control_features("shuffled", some, ("states",))
    assert sets == ("states",)
    assert sorted(shuffled["states"][:, 0]) == sorted(some.features["states"][:, 0])
    assert (shuffled["states"] != some.features["states"]).any()
    task, sets = control_features("task", some, ("states",))
    assert sets == ("task",)
    assert len(np.unique(task["task"], axis=0)) == 3
    assert control_features("length", some, ("states",))[1] == ("length",)


def test_a_control_is_searched_for_by_itself() -> None:
    """What serves a controller of 6 states may be far off for one of the length."""
    config = load_config(ROOT / "configs/demo.yaml", ["evaluation.control_trials=6"])
    some, best = table(200, 0), Settings("logistic", ("states",), 6, {"l2": 1.0})
    features, sets = control_features("length", some, best.sets)
    found = control_settings(best, features, sets, some, config)
    assert (found.name, found.sets) == ("logistic", ("length",))
    work = Work(features, some.kept, some.budgets, regret_bounds(config, some), config.tuning)
    own = work.judge(found)
    assert own <= work.judge(replace(best, sets=sets)), "the best controller's settings were tried too"
    assert own <= work.judge(Settings("logistic", sets, 24, {"l2": 0.03})), "and the defaults"


def test_tasks_that_were_never_seen_are_decided_without_them() -> None:
    settings = Settings("logistic", ("states",), 6)
    fit, calibrate, test = table(300, 0), table(300, 1), table(150, 2)
    config = load_config(ROOT / "configs/demo.yaml", ["evaluation.alphas=[.05]", "calibration.risk=score_lost"])
    found = unseen_tasks(settings, fit, np.arange(300) % 3 == 0, calibrate, test, config)
    with_test, without = found["at_losses"]
    assert (with_test["policy"], without["policy"]) == (TESTED, UNTESTED)
    assert without["value"] > 0.6
    assert [row["task"] for row in found["tasks"]] == ["a", "b", "c"]
    for row in found["tasks"]:
        assert row["sent"] < 0.3, "these tasks differ by their name alone"
        assert row[UNTESTED]["budget"] <= row[TESTED]["budget"] < 1
    one = test.rows(np.flatnonzero(test.tasks == "a"))
    assert unseen_tasks(settings, fit, np.arange(300) % 3 == 0, calibrate, one, config)["tasks"] == []


def test_a_task_unlike_the_others_is_sent_to_the_full_model() -> None:
    """Its prompts look easy to a controller that never saw them, and lose everything."""
    random = np.random.default_rng(0)

    def with_strange(seed: int) -> Table:
        some = table(240, seed)
        strange = some.tasks == "c"
        some.features["states"][strange] = 8 + random.normal(size=(strange.sum(), 6))
        some.scores[strange, 0] = 0
        return some

    config = load_config(ROOT / "configs/demo.yaml", ["calibration.risk=score_lost"])
    fit, calibrate, test = (with_strange(seed) for seed in range(3))
    held = np.arange(240) % 4 == 1
    rows = unseen_tasks(Settings("logistic", ("states",), 6), fit, held, calibrate, test, config)["tasks"]
    (strange,) = [row for row in rows if row["task"] == "c"]
    assert strange["sent"] > 0.95
    assert strange[UNTESTED]["quality_ratio"] < 0.2
    assert strange[TESTED]["quality_ratio"] > 0.95


@pytest.mark.parametrize(
    ("mine", "shuffled", "knows"), [(0.4, 0.1, True), (0.1, 0.1, False), (None, 0.1, False), (0.2, None, True)]
)
def test_a_controller_that_does_not_beat_shuffled_features_is_found_out(mine, shuffled, knows) -> None:
    rows = [
        {"alpha": alpha, "policy": policy, "value": value if alpha == 0.1 else 1 - (value or 0)}
        for alpha in (0.01, 0.1)
        for policy, value in (("mlp", mine), ("shuffled", shuffled))
    ]
    assert _knows_the_prompt(rows, "mlp", 0.09) is knows
