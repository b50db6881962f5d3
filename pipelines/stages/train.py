"""Stage 6: each controller with its best settings, fitted on the prompts to train and to tune."""

from __future__ import annotations

import shutil
from pathlib import Path, PurePath

import numpy as np

from backbone.files import replacing
from controller.base import CONTROLLERS, FittedPredictor, Floats
from controller.certificate.outliers import OutlierTest
from controller.features import Features, Projection
from controller.learning import CrossFit, Settings, learn
from pipelines.evaluation.learning_table import Table
from pipelines.run.progress import progress
from pipelines.run.state import check_own
from pipelines.run.workspace import Workspace

PROJECTION = "projection.safetensors"
OUT_OF_FOLD = "expected_losses.npz"
FOLDS = 5


def run(workspace: Workspace) -> Path:
    """Fit every controller; writes `controllers/<name>/`, and `expected_losses.npz`, out of fold."""
    target, unfinished = workspace.path("controllers"), workspace.path(".controllers.unfinished")
    check_own(target, _is_own)
    table, found = workspace.table("train", "tune"), tuned_settings(workspace)
    shutil.rmtree(unfinished, ignore_errors=True)
    expected: dict[str, Floats] = {}
    with progress("controllers", len(found)) as advance:
        for name, settings in found.items():
            learned = learn(settings, table.features, table.losses, table.budgets)
            (unfinished / name).mkdir(parents=True)
            learned.projection.save(unfinished / name / PROJECTION)
            learned.controller.save(unfinished / name)
            expected[name] = out_of_fold(settings, table.features, table)
            advance(1)
    with replacing(workspace.path(OUT_OF_FOLD)) as path, path.open("wb") as file:
        np.savez(file, **expected)  # type: ignore[arg-type]
    shutil.rmtree(target, ignore_errors=True)
    return unfinished.rename(target)


def _is_own(file: PurePath) -> bool:
    """Whether this stage writes a file of that path in its folder."""
    name, *rest = file.parts
    return name in CONTROLLERS and "/".join(rest) in {PROJECTION, *CONTROLLERS[name].FILES}


def out_of_fold(settings: Settings, features: Features, table: Table) -> Floats:
    """What is expected of each prompt [N, K] by a controller that did not see it."""
    n_folds = min(FOLDS, len(table.prompts))
    *_, (predicted, _) = CrossFit(features, table.losses, table.budgets, n_folds, settings.components).predict(settings)
    return predicted


def load_out_of_fold(workspace: Workspace) -> dict[str, Floats]:
    """What each controller expects out of fold of the prompts to train and to tune [N, K]."""
    with np.load(workspace.path(OUT_OF_FOLD), allow_pickle=False) as saved:
        return {name: saved[name] for name in tuned_settings(workspace)}


def tuned_settings(workspace: Workspace) -> dict[str, Settings]:
    """The best settings of each controller, as the stage `tune` found them."""
    tuning = workspace.read("tuning.json")["controllers"]
    return {name: Settings.from_dict(found["settings"]) for name, found in tuning.items()}


def load_trained(workspace: Workspace, outliers: OutlierTest | None = None) -> dict[str, FittedPredictor]:
    """What this stage saved, each with a test that leaves outliers to the full plan."""
    folders = {name: workspace.path("controllers") / name for name in tuned_settings(workspace)}
    return {
        name: FittedPredictor(Projection.load(folder / PROJECTION), CONTROLLERS[name].load(folder), outliers)
        for name, folder in folders.items()
    }
