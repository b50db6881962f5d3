"""Stage 6: a certified threshold for each controller, and the allocator with the best one."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from controller.calibration import Certificate, fewest_prompts, valid_threshold
from controller.report_card import threshold_losses
from pipelines.config import Config
from pipelines.progress import console
from pipelines.stages import write_atomically
from pipelines.train import load_trained
from pipelines.workspace import Table, Workspace
from runtime.allocator import Allocator


def run(config: Config) -> Path:
    """Writes `calibration.json` with a certificate a controller, and saves the best controller as `allocator/`.

    Which controller is best was decided on the tune split, so the calibrate split has seen no choice but the threshold.
    """
    workspace = Workspace.of(config)
    table = workspace.table("calibrate")
    projection, controllers = load_trained(workspace)
    features = projection(table.features)
    certificates = {name: certify(c.predict(features), table, config) for name, c in controllers.items()}
    best = json.loads(workspace.path("tuning.json").read_text())["best"]
    if certificates[best].threshold is None:
        console.print(f"  {certificates[best].sentence}")
    allocator = Allocator(
        menu=workspace.menu(),
        controller=controllers[best],
        controller_name=best,
        projection=projection,
        certificate=certificates[best],
        decoding=config.decoding.settings(),
        fingerprint=workspace.fingerprint,
        model_source=config.model.source,
        stand_ins=None if workspace.stand_ins.is_empty else workspace.stand_ins,
    )
    allocator.save_pretrained(workspace.path("allocator"))
    data = {"best": best, "certificates": {name: asdict(c) for name, c in certificates.items()}}
    write_atomically(workspace.path("calibration.json"), json.dumps(data, indent=2) + "\n")
    return workspace.path("allocator")


def certify(probabilities: np.ndarray, table: Table, config: Config) -> Certificate:
    """Learn-then-Test on a table, for a controller that predicted `probabilities` [N, K] there."""
    alpha, delta = config.calibration.alpha, config.calibration.delta
    threshold = valid_threshold(lambda value: threshold_losses(probabilities, table.sufficient, value), alpha, delta)
    losses = threshold_losses(probabilities, table.sufficient, 2.0 if threshold is None else threshold)
    return Certificate(
        risk="share of prompts whose answer scores lower than the full model's"
        + (f" by more than {config.label.tolerance}" if config.label.tolerance else ""),
        alpha=alpha,
        delta=delta,
        n=len(table.prompts),
        threshold=threshold,
        observed_risk=float(losses.mean()),
        prompts_hash=hashlib.sha256("".join(prompt.hash for prompt in table.prompts).encode()).hexdigest()[:16],
        date=datetime.now(UTC).date().isoformat(),
        fewest_prompts=fewest_prompts(alpha, delta),
    )
