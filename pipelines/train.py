"""Stage 5: the controllers, trained with the tuned settings on the train and tune splits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from controller.base import Controller, controller_class
from controller.features import Projection
from pipelines.config import Config
from pipelines.progress import progress
from pipelines.workspace import Table, Workspace


def run(config: Config) -> Path:
    """Writes `controllers/`: the projection, and a folder for each controller."""
    workspace = Workspace.of(config)
    settings = json.loads(workspace.path("tuning.json").read_text())["controllers"]
    table = workspace.table("train", "tune")
    unfinished = workspace.path(".controllers.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    projection = Projection.fit(table.features, config.features.components)
    projection.save(unfinished / "projection.safetensors")
    with progress("controllers", len(settings)) as advance:
        for name, found in settings.items():
            (unfinished / name).mkdir()
            fitted(name, found["parameters"], projection, table).save(unfinished / name)
            advance(1)
    target = workspace.path("controllers")
    shutil.rmtree(target, ignore_errors=True)
    return unfinished.rename(target)


def fitted(name: str, parameters: dict[str, float], projection: Projection, table: Table) -> Controller:
    """A new controller, fitted on a table."""
    controller = controller_class(name)(**parameters)
    controller.fit(projection(table.features), table.sufficient, table.budgets.astype("float32"))
    return controller


def load_trained(workspace: Workspace) -> tuple[Projection, dict[str, Controller]]:
    """What this stage saved."""
    folder = workspace.path("controllers")
    names = json.loads(workspace.path("tuning.json").read_text())["controllers"]
    controllers = {name: controller_class(name).load(folder / name) for name in names}
    return Projection.load(folder / "projection.safetensors"), controllers
