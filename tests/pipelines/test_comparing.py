"""Controls know less than the controller, and the report says so when the controller knows nothing."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from controller.certificate.risks import plan_losses
from controller.learning import Settings
from oracle.prompts import Prompt
from pipelines.config import load_config
from pipelines.evaluation.controls import (
    _controls,
    control_features,
    control_settings,
    knows_the_prompt,
    pooled_gain,
    with_task,
)
from pipelines.evaluation.learning_table import Table
from pipelines.run.progress import Omissions
from pipelines.stages.train import out_of_fold

ROOT = Path(__file__).parents[2]


def table(n: int, seed: int) -> Table:
    """The first state decides what the shortened plan loses, whatever the task."""
    random = np.random.default_rng(seed)
    states = random.normal(size=(n, 6)).astype(np.float32)
    scores = np.column_stack([np.clip(states[:, 0] + 0.5, 0, 1), np.ones(n)])
    prompts = [Prompt(str(i), "abc"[i % 3], f"text {i}", "", "kl") for i in range(n)]
    features = {"states": states, "length": random.normal(size=(n, 1)).astype(np.float32)}
    return Table(prompts, features, scores, scores >= 1, 1 - scores, np.array([0.5, 1.0]), "score_lost")


def test_the_loss_is_what_the_certificate_bounds() -> None:
    scores = np.array([[0.2, 0.9, 0.6], [0.6, 0.5, 0.6]])
    sufficient = scores >= scores[:, -1:]
    np.testing.assert_allclose(plan_losses("score_lost", scores, sufficient), [[0.4, 0, 0], [0, 0.1, 0]])
    np.testing.assert_allclose(plan_losses("mean_score", scores, sufficient), [[0.4, -0.3, 0], [0, 0.1, 0]])
    np.testing.assert_array_equal(plan_losses("insufficient", scores, sufficient), [[1, 0, 0], [0, 1, 0]])


def test_controls_see_what_they_are_named_after() -> None:
    some = table(30, 0)
    shuffled, sets = control_features("shuffled", some, ("states",))
    assert sets == ("states",)
    assert sorted(shuffled["states"][:, 0]) == sorted(some.features["states"][:, 0])
    assert (shuffled["states"] != some.features["states"]).any()
    task, sets = control_features("task", some, ("states",))
    assert sets == ("task",)
    assert len(np.unique(task["task"], axis=0)) == 3
    assert control_features("embedding", some, ("states",))[1] == ("embedding",)


KINDS = {
    "embedded": "capital category continent copy extract opposite past retell sentiment sequence translate unscramble",
    "mixed": "ag_news common_gen cosmos_qa dream gigaword gsm8k samsum",
}


@pytest.mark.parametrize("names", KINDS.values(), ids=KINDS)
def test_no_two_tasks_share_a_column(names: str) -> None:
    tasks = names.split()
    some = table(2 * len(tasks), 0)
    prompts = [replace(prompt, task=tasks[i // 2]) for i, prompt in enumerate(some.prompts)]
    columns = with_task(replace(some, prompts=prompts), tasks)["task"]
    np.testing.assert_array_equal(columns, np.repeat(np.eye(len(tasks)), 2, axis=0))
    assert not with_task(some, tasks)["task"].any(), "tasks that were not seen"


def test_a_control_has_the_default_settings() -> None:
    """Whatever the best controller's are, and however many prompts there are."""
    tuning, best = load_config(ROOT / "configs/demo.yaml").tuning, Settings("logistic", ("states",), 12, {"l2": 1.0})
    assert control_settings(best, ("task",), tuning) == Settings("logistic", ("task",), 48, {"l2": 0.03})


def test_a_control_that_nothing_can_be_learned_from_is_left_out(capsys) -> None:
    """Prompts of one task, whose embeddings are not finite: one of the controls is left."""
    some, left_out = table(60, 0), Omissions()
    some.features["embedding"] = np.full((60, 2), np.nan, dtype=np.float32)
    one = replace(some, prompts=[replace(prompt, task="only") for prompt in some.prompts])
    config = load_config(ROOT / "configs/demo.yaml")
    found = _controls(Settings("logistic", ("states",), 6), one, config.tuning, left_out)
    assert found.keys() == {"shuffled"}
    assert left_out.keys() == {f"the control {name!r}" for name in ("task", "embedding")}
    assert left_out["the control 'task'"] == "all 60 prompts have the same features (task), so nothing tells them apart"
    printed = " ".join(capsys.readouterr().out.split())
    assert all(f"{name} is left out: {reason}" in printed for name, reason in left_out.items())


@pytest.mark.parametrize("error", [TypeError, KeyError, IndexError, AssertionError, AttributeError])
def test_an_error_of_the_program_ends_the_run(error: type[Exception]) -> None:
    with pytest.raises(error), Omissions().guard("a picture"):
        raise error("a fault")


@pytest.mark.parametrize(
    ("lows", "knows"),
    [
        ({"shuffled": 0.01, "task": 0.01}, True),
        ({"shuffled": 0.01}, True),
        ({"shuffled": 0.01, "task": 0.0}, False),
        ({"shuffled": 0.01, "task": -0.02}, False),
        ({"shuffled": -0.01, "task": 0.01}, False),
        ({"task": 0.01}, False),
        ({}, False),
    ],
)
def test_a_controller_must_beat_what_does_not_look_at_the_prompt(lows: dict[str, float], knows: bool) -> None:
    against = {name: {"score_gained": {"low": low}} for name, low in {"static_mixture": 0.1, **lows}.items()}
    assert knows_the_prompt(against) is knows


@pytest.mark.parametrize(("by_task", "knows"), [(False, True), (True, False)])
def test_where_the_task_says_all_the_prompt_is_not_known(by_task: bool, knows: bool) -> None:
    """What the shortened plan keeps follows the first state, or the task, of which the states then tell too."""
    random, some = np.random.default_rng(1), table(400, 0)
    if by_task:
        lines = np.eye(3)[[ord(task) - ord("a") for task in some.tasks]]
        some.features["states"][:, :3] = 3 * lines + 0.3 * random.normal(size=(400, 3))
        some.scores[:, 0] = random.random(400) < lines @ [0.2, 0.7, 0.95]
        some.losses[:, 0] = 1 - some.scores[:, 0]
    settings = Settings("logistic", ("states",), 6)
    named = replace(settings, sets=("task",))
    expected = {
        "shuffled": out_of_fold(settings, control_features("shuffled", some, ("states",))[0], some),
        "task": out_of_fold(named, control_features("task", some, ("states",))[0], some),
    }
    found = pooled_gain(out_of_fold(settings, some.features, some), expected, some, 0.1)
    assert found["prompts"] == 400
    assert found["against"]["shuffled"]["score_gained"]["low"] > 0
    assert found["against"]["static_mixture"]["budget_saved"]["low"] > 0
    assert knows_the_prompt(found["against"]) is knows
