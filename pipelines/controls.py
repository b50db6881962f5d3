"""Do the controllers know the prompt? At equal losses: controllers and controls, unseen tasks, another template."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from controller.base import Floats, choose
from controller.features import Features, rows_of
from controller.learning import Learned, Settings, learn
from controller.report.headroom_card import captured_by
from controller.report.report_card import price_for_loss
from pipelines.config import Config
from pipelines.learning_table import Table
from pipelines.progress import progress
from pipelines.settings_search import Work, regret_bounds, search_in_memory
from pipelines.stages.calibrate import certified
from pipelines.stages.features import features_of
from pipelines.stages.train import load_trained, tuned_settings
from pipelines.workspace import Workspace

CONTROLS = ("shuffled", "length", "task", "embedding")
"""Controllers of the best one's kind with features that know less: another prompt's, the length alone, the task's name
alone, the mean embedding alone. Each has a search of its own: none loses by settings made for other features."""

TASK_COLUMNS = 64

Choices = NDArray[np.intp]
Rows = list[dict[str, Any]]


def comparison(workspace: Workspace, best: str, calibrate: Table, test: Table) -> dict[str, Any]:
    """What is captured at each of `evaluation.alphas`, by controllers, controls and the best one on unseen tasks.

    A price is picked on the calibrate split so that the mean loss there is the bound, without a guarantee, which would
    make up for different policies' noise by different margins; then the test split is measured. `certified` is the best
    controller with the guarantee.
    """
    alphas = workspace.config.evaluation.alphas
    fit, settings = workspace.table("train", "tune"), tuned_settings(workspace)[best]
    with progress("searches of controls", len(CONTROLS)) as advance:
        controls = {name: _control(name, settings, fit, workspace.config, advance) for name in CONTROLS}
    learned = {**load_trained(workspace), **controls}
    predicted = {name: _both(name, found, calibrate, test) for name, found in learned.items()}
    rows: Rows = []
    for alpha in alphas:
        chosen = {name: _chosen(*both, calibrate, test, alpha) for name, both in predicted.items()}
        rows += _measured(alpha, chosen, test, frozenset(CONTROLS))
    found = {
        "at_losses": rows,
        "certified": [_certified(workspace, *predicted[best], calibrate, test, alpha) for alpha in alphas],
        "unseen_tasks": _unseen_tasks(settings, fit, calibrate, test, alphas),
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


def _chosen(seen: Floats, predicted: Floats, calibrate: Table, test: Table, alpha: float) -> Choices:
    price = price_for_loss(seen, calibrate.kept, calibrate.budgets, alpha * calibrate.unit)
    return choose(predicted, test.budgets, price)


def _measured(alpha: float, chosen: Mapping[str, Choices], test: Table, controls: frozenset[str] = frozenset()) -> Rows:
    captured = captured_by(chosen, test.scores, test.budgets, controls)
    return [
        {"alpha": alpha, "policy": name, **_outcome(choice, test), **asdict(captured[name])}
        for name, choice in chosen.items()
    ]


def _outcome(chosen: Choices, test: Table) -> dict[str, float]:
    rows = np.arange(len(chosen))
    return {
        "budget": float(test.budgets[chosen].mean()),
        "loss": float(test.losses[rows, chosen].mean()) / test.unit,
        "quality_ratio": float(test.scores[rows, chosen].mean() / max(test.scores[:, -1].mean(), 1e-12)),
    }


def _certified(
    workspace: Workspace, seen: Floats, predicted: Floats, calibrate: Table, test: Table, alpha: float
) -> dict[str, Any]:
    price = certified(seen, calibrate, workspace, alpha).price
    return {"alpha": alpha, "price": price, **_outcome(choose(predicted, test.budgets, price), test)}


def _knows_the_prompt(rows: Rows, best: str, alpha: float) -> bool:
    """Whether the best controller captures more than the same with shuffled features, near the bound that was asked."""
    nearest = min({row["alpha"] for row in rows}, key=lambda value: abs(value - alpha))
    mine, shuffled = (
        next(row["value"] for row in rows if (row["alpha"], row["policy"]) == (nearest, name))
        for name in (best, "shuffled")
    )
    return mine is not None and (shuffled is None or mine > shuffled)


def _unseen_tasks(settings: Settings, fit: Table, calibrate: Table, test: Table, alphas: Sequence[float]) -> Rows:
    """Every test prompt decided by a controller, and at a price, that never saw its task; none with a single task."""
    tasks = np.unique(test.tasks)
    if len(tasks) < 2:
        return []
    chosen = {alpha: np.full(len(test.prompts), len(test.budgets) - 1) for alpha in alphas}
    for task in tasks:
        known, others = (table.rows(np.flatnonzero(table.tasks != task)) for table in (fit, calibrate))
        mine = np.flatnonzero(test.tasks == task)
        if len(known.prompts) < 2 or not len(others.prompts):
            continue
        learned, unseen = learn(settings, known.features, known.kept, known.budgets), test.rows(mine)
        seen, predicted = learned.predict(others.features), learned.predict(unseen.features)
        for alpha in alphas:
            chosen[alpha][mine] = _chosen(seen, predicted, others, unseen, alpha)
    return [row for alpha in alphas for row in _measured(alpha, {"unseen_tasks": chosen[alpha]}, test)]


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
        for row in _measured(alpha, {"template": _chosen(seen, predicted, calibrate, table, alpha)}, table)
    ]
