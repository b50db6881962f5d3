"""Stage 6: each controller with its best settings, fitted on the prompts to train and to tune."""

from __future__ import annotations

import json
import shutil
from pathlib import Path, PurePath

from controller.base import CONTROLLERS
from controller.certificate.outliers import OutlierTest
from controller.certificate.risks import full_quality
from controller.learning import FittedPredictor, Settings, learn
from controller.projection import Projection
from pipelines.config import Config
from pipelines.run.progress import progress
from pipelines.run.state import check_own
from pipelines.run.workspace import Workspace

PROJECTION = "projection.safetensors"


def run(config: Config) -> Path:
    """Fit every controller; writes `controllers/<name>/`."""
    workspace = Workspace.of(config)
    check_own(workspace.path("controllers"), _is_own)
    table = workspace.table("train", "tune")
    unfinished = workspace.path(".controllers.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    found = tuned_settings(workspace)
    with progress("controllers", len(found)) as advance:
        for name, settings in found.items():
            learned = learn(settings, table.features, table.kept, table.budgets)
            (unfinished / name).mkdir(parents=True)
            learned.projection.save(unfinished / name / PROJECTION)
            learned.controller.save(unfinished / name)
            advance(1)
    target = workspace.path("controllers")
    shutil.rmtree(target, ignore_errors=True)
    return unfinished.rename(target)


def _is_own(file: PurePath) -> bool:
    """Whether this stage writes a file of that path in its folder."""
    name, *rest = file.parts
    return name in CONTROLLERS and "/".join(rest) in {PROJECTION, *CONTROLLERS[name].FILES}


def tuned_settings(workspace: Workspace) -> dict[str, Settings]:
    """The best settings of each controller, as the stage `tune` found them."""
    tuning = json.loads(workspace.path("tuning.json").read_text())["controllers"]
    return {name: Settings.from_dict(found["settings"]) for name, found in tuning.items()}


def load_trained(workspace: Workspace, outliers: OutlierTest | None = None) -> dict[str, FittedPredictor]:
    """What this stage saved, each with a test that leaves outliers to the full plan."""
    full = full_quality(workspace.config.calibration.risk)
    folders = {name: workspace.path("controllers") / name for name in tuned_settings(workspace)}
    return {
        name: FittedPredictor(Projection.load(folder / PROJECTION), CONTROLLERS[name].load(folder), full, outliers)
        for name, folder in folders.items()
    }
