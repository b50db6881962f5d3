"""Do the controllers know the prompt? Controllers and controls at equal losses."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from controller.base import Floats, choose
from controller.features import Features, rows_of
from controller.learning import FittedPredictor, Settings, learn
from pipelines.config import Config
from pipelines.config.learning_sections import TuningSection
from pipelines.evaluation.learning_table import Table
from pipelines.evaluation.omissions import Omissions
from pipelines.evaluation.policies import Choices, Rows, chosen_at, measured
from pipelines.evaluation.pooled_gain import BLIND, knows_the_prompt, out_of_fold, pooled_gain
from pipelines.run.progress import progress
from pipelines.run.workspace import IN_FULL, Workspace
from pipelines.stages.calibrate import price_out_of_fold
from pipelines.stages.settings_regret import default_settings
from pipelines.stages.train import load_trained, tuned_settings
from runtime.parts import AllocatorParts

CONTROLS = ("shuffled", "task", "embedding")
"""Controllers of the best one's kind, at default settings, with features that know less: another prompt's, the task's
name alone, the mean embedding alone. One that nothing can be learned from, such as a single task's name, is left out
by name."""


def comparison(
    workspace: Workspace,
    best: str,
    expected: Mapping[str, Floats],
    fit: Table,
    test: Table,
    allocator: AllocatorParts,
    left_out: Omissions,
) -> tuple[dict[str, Any], Choices | None]:
    """What is captured at each of `calibration.keep`, by controllers and controls.

    A price is picked out of fold on the prompts to train and to tune so that the mean loss there is the bound, without
    a guarantee, which would make up for different policies' noise by different margins; then the test split is
    measured, without the outlier test, which is not about knowing the prompt. `pooled` is what the best controller
    gains out of fold on all prompts that are labelled in full. What cannot be made is named in `left_out`.

    Args:
        workspace: of the run.
        best: name of the controller that the allocator has.
        expected: of each controller, what it expects out of fold of the prompts of `fit`.
        fit: the prompts to train and to tune.
        test: the prompts that are measured.
        allocator: whose bound and outlier test the task's name gets too.
        left_out: takes the names.

    Returns:
        This, and the plans of the test prompts by the name of the task alone, with the allocator's outlier test and
        bound; None where names teach nothing.
    """
    config, settings = workspace.config, tuned_settings(workspace)[best]
    controls = _controls(settings, fit, config, left_out)
    learned, shown = load_trained(workspace), with_task(test, fit.tasks)
    policies = {name: (expected[name], each) for name, each in learned.items()}
    policies |= {name: (seen, policy) for name, (_, seen, policy) in controls.items()}
    predicted = {name: (seen, policy.predict(shown)) for name, (seen, policy) in policies.items()}
    rows: Rows = []
    for keep in config.calibration.keep:
        chosen = {name: chosen_at(*both, fit, test, keep) for name, both in predicted.items()}
        rows += measured(keep, chosen, test, frozenset(CONTROLS))
    found: dict[str, Any] = {"at_losses": rows, "pooled": None}
    with left_out.guard("the comparison out of fold"):
        rivals = {name: own for name, (own, *_) in controls.items() if name in BLIND}
        found["pooled"] = _pooled(workspace.table(*IN_FULL), settings, rivals, config.calibration.alpha, left_out)
    found["knows_the_prompt"] = found["pooled"] is not None and knows_the_prompt(found["pooled"]["against"])
    return found, _routed(*controls["task"][1:], shown, fit, test, allocator, config) if "task" in controls else None


def _routed(
    seen: Floats,
    learned: FittedPredictor,
    shown: Features,
    fit: Table,
    test: Table,
    allocator: AllocatorParts,
    config: Config,
) -> Choices:
    """Plans of the test prompts by the name of the task, at a price that is tested out of fold on `fit`."""
    price = price_out_of_fold(seen, fit, config.calibration, allocator.certificate.keep)
    return choose(replace(learned, outliers=allocator.outliers).predict(shown), test.budgets, price)


def _controls(
    best: Settings, fit: Table, config: Config, left_out: Omissions
) -> dict[str, tuple[Settings, Floats, FittedPredictor]]:
    """Each control that something can be learned from: its settings, and of the prompts of `fit` what it expects out of
    fold and what it learned."""
    found = {}
    with progress("controls", len(CONTROLS)) as advance:
        for name in CONTROLS:
            with left_out.guard(f"the control {name!r}"):
                features, sets = control_features(name, fit, best.sets)
                settings = control_settings(best, sets, config.tuning)
                learned = learn(settings, features, fit.kept, fit.budgets)
                found[name] = settings, out_of_fold(settings, features, fit), learned
            advance(1)
    return found


def _pooled(
    table: Table, best: Settings, rivals: Mapping[str, Settings], alpha: float, left_out: Omissions
) -> dict[str, Any]:
    """See `pipelines.evaluation.pooled_gain`."""
    predicted = {}
    for name, settings in rivals.items():
        with left_out.guard(f"the control {name!r} out of fold"):
            predicted[name] = out_of_fold(settings, control_features(name, table, best.sets)[0], table)
    return pooled_gain(out_of_fold(best, table.features, table), predicted, table, alpha)


def control_settings(best: Settings, sets: tuple[str, ...], tuning: TuningSection) -> Settings:
    """A control's settings: the defaults of the best controller's kind, for its own sets of features."""
    return default_settings(best.name, tuning.model_copy(update={"feature_sets": [list(sets)]}))


def control_features(name: str, table: Table, sets: tuple[str, ...]) -> tuple[Features, tuple[str, ...]]:
    """What a control learns from: features and the sets of them, where the controller reads `sets`."""
    if name == "shuffled":
        order = np.random.default_rng(0).permutation(len(table.prompts))
        return rows_of(table.features, order), sets
    return with_task(table, table.tasks), (name,)


def with_task(table: Table, known: Iterable[str]) -> Features:
    """The table's features and the set `task`: a column for each known task, sorted; other tasks are 0 in all."""
    names = np.array(sorted(set(known)))
    return {**table.features, "task": (table.tasks[:, None] == names).astype(np.float32)}
