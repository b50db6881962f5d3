"""Do the controllers know the prompt? At equal losses: controllers and controls, unseen tasks, another template."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from controller.base import Floats, choose
from controller.certificate.outliers import OutlierTest
from controller.features import Features, rows_of
from controller.learning import Learned, Settings, learn
from pipelines.config import Config
from pipelines.learning_table import Table
from pipelines.measured_policies import Rows, chosen_at, measured, outcome
from pipelines.progress import progress
from pipelines.settings_search import Work, regret_bounds, search_in_memory
from pipelines.stages.calibrate import price_of
from pipelines.stages.features import features_of
from pipelines.stages.train import load_trained, tuned_settings
from pipelines.unseen_tasks import are_among, unseen_tasks
from pipelines.workspace import Workspace

CONTROLS = ("shuffled", "length", "task", "embedding")
"""Controllers of the best one's kind with features that know less: another prompt's, the length alone, the task's name
alone, the mean embedding alone. Each has a search of its own: none loses by settings made for other features. Where all
prompts are of one task, its name tells nothing, and there is no such control."""

TASK_COLUMNS = 64


def comparison(
    workspace: Workspace, best: str, calibrate: Table, test: Table, outliers: OutlierTest | None
) -> dict[str, Any]:
    """What is captured at each of `evaluation.alphas`, by controllers, controls and the best one on unseen tasks.

    A price is picked on the calibrate split so that the mean loss there is the bound, without a guarantee, which would
    make up for different policies' noise by different margins; then the test split is measured, without the outlier
    test, which is not about knowing the prompt. `certified` is the best controller with the guarantee and with that
    test; `tasks_held_out` are the rows of `unseen_tasks` at the bound that was asked for.
    """
    alphas = workspace.config.evaluation.alphas
    fit, settings = workspace.table("train", "tune"), tuned_settings(workspace)[best]
    names = [name for name in CONTROLS if name != "task" or len(set(fit.tasks)) > 1]
    with progress("searches of controls", len(names)) as advance:
        controls = {name: _control(name, settings, fit, workspace.config, advance) for name in names}
    learned = {**load_trained(workspace), **controls}
    predicted = {name: _both(name, found, calibrate, test) for name, found in learned.items()}
    rows: Rows = []
    for alpha in alphas:
        chosen = {name: chosen_at(*both, calibrate, test, alpha) for name, both in predicted.items()}
        rows += measured(alpha, chosen, test, frozenset(CONTROLS))
    tested = _both(best, replace(learned[best], outliers=outliers), calibrate, test)
    unseen = unseen_tasks(settings, fit, are_among(workspace.splits["tune"], fit), calibrate, test, workspace.config)
    found = {
        "at_losses": rows,
        "certified": [_certified(workspace, *tested, calibrate, test, alpha, len(alphas)) for alpha in alphas],
        "unseen_tasks": unseen["at_losses"],
        "tasks_held_out": unseen["tasks"],
        "knows_the_prompt": _knows_the_prompt(rows, best, workspace.config.calibration.alpha),
    }
    if workspace.config.evaluation.template is not None:
        found["template"] = _other_template(workspace, learned[best], predicted[best][0], calibrate, test)
    return found


def _control(name: str, best: Settings, fit: Table, config: Config, advance: Callable[[int], None]) -> Learned:
    features, sets = control_features(name, fit, best.sets)
    settings = control_settings(best, features, sets, fit, config)
    advance(1)
    return learn(settings, features, fit.kept, fit.budgets)


def control_settings(best: Settings, features: Features, sets: tuple[str, ...], fit: Table, config: Config) -> Settings:
    """What a search with a control's features finds, `evaluation.control_trials` long; the best controller's own
    settings are among those tried."""
    trials = config.evaluation.control_trials
    changes = {"feature_sets": [list(sets)], "trials": trials, "given": {}}
    components = sorted({*config.tuning.components, best.components})
    tuning = config.tuning.model_copy(update={**changes, "components": components})
    work = Work(features, fit.kept, fit.budgets, regret_bounds(config, fit), tuning)
    return search_in_memory(best.name, work, {"components": best.components, **best.parameters})


def control_features(name: str, table: Table, sets: tuple[str, ...]) -> tuple[Features, tuple[str, ...]]:
    """What a control learns from: features and the sets of them, where the controller reads `sets`."""
    if name == "shuffled":
        order = np.random.default_rng(0).permutation(len(table.prompts))
        return rows_of(table.features, order), sets
    return _features(name, table), (name,)


def _features(name: str, table: Table) -> Features:
    """The table's features; for the control that knows the task, its name, hashed to one of TASK_COLUMNS columns."""
    if name != "task":
        return table.features
    hashed = [zlib.crc32(task.encode()) % TASK_COLUMNS for task in table.tasks]
    return {"task": np.eye(TASK_COLUMNS, dtype=np.float32)[hashed]}


def _both(name: str, learned: Learned, calibrate: Table, test: Table) -> tuple[Floats, Floats]:
    """What is expected of the prompts to calibrate and of those to test."""
    first, second = (learned.predict(_features(name, table)) for table in (calibrate, test))
    return first, second


def _certified(
    workspace: Workspace, seen: Floats, predicted: Floats, calibrate: Table, test: Table, alpha: float, together: int
) -> dict[str, Any]:
    """At one of several bounds, which share delta, so that a choice among them afterwards is covered."""
    price = price_of(seen, calibrate, workspace.config.calibration, alpha, together)
    return {"alpha": alpha, "price": price, **outcome(choose(predicted, test.budgets, price), test)}


def _knows_the_prompt(rows: Rows, best: str, alpha: float) -> bool:
    """Whether the best controller captures more than the same with shuffled features, near the bound that was asked."""
    nearest = min({row["alpha"] for row in rows}, key=lambda value: abs(value - alpha))
    mine, shuffled = (
        next(row["value"] for row in rows if (row["alpha"], row["policy"]) == (nearest, name))
        for name in (best, "shuffled")
    )
    return mine is not None and (shuffled is None or mine > shuffled)


def _other_template(workspace: Workspace, learned: Learned, seen: Floats, calibrate: Table, test: Table) -> Rows:
    """Some test prompts put into another template, with labels and features of their own; no rows where judges fail
    on all of them."""
    evaluation = workspace.config.evaluation
    assert evaluation.template is not None
    put = evaluation.template.format
    prompts = workspace.rendered(
        [
            replace(prompt, id=f"{prompt.id} in template").reworded(lambda text: put(prompt=text))
            for prompt in test.prompts[: evaluation.template_prompts]
        ]
    )
    scores = workspace.label_anew(workspace.labeller, prompts, workspace.menu(), "labels in another template")
    table = workspace.table_of(prompts, scores, features_of(workspace, prompts))
    if not table.prompts:
        return []
    predicted = learned.predict(table.features)
    return [
        row
        for alpha in evaluation.alphas
        for row in measured(alpha, {"template": chosen_at(seen, predicted, calibrate, table, alpha)}, table)
    ]
