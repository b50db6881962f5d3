"""Stage 7: a certified price for each controller, and the allocator with the best one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from backbone.files import write_atomically
from controller.base import choose
from controller.certificate.calibration import certify
from controller.certificate.certificate import Certificate
from controller.certificate.drift import DriftAlarm, drift_scores
from controller.certificate.outliers import OutlierTest
from controller.learning import Learned
from controller.report.report_card import losses_at
from oracle.labels.token_agreement import acceptance_rates
from pipelines.config import Config
from pipelines.learning_table import Table
from pipelines.progress import say
from pipelines.stages.train import load_trained
from pipelines.unseen_tasks import are_among, outlier_test
from pipelines.workspace import Workspace
from runtime.allocator import Allocator
from runtime.chat_format import ChatFormat
from runtime.saving.allocator_checks import optional_parts


def run(config: Config) -> Path:
    """Writes `calibration.json` with a certificate a controller, and saves the best controller as `allocator/`.

    Which controller is best was decided on the other prompts, so the calibrate split has seen no choice but the price.
    """
    workspace = Workspace.of(config)
    table = workspace.table("calibrate")
    best = json.loads(workspace.path("tuning.json").read_text())["best"]
    trained = load_trained(workspace)
    fit = workspace.table("train", "tune")
    outliers = outlier_test(trained[best], fit, are_among(workspace.splits["tune"], fit), config)
    trained = tested(trained, outliers)
    certificates = {
        name: certified(learned.predict(table.features), table, workspace) for name, learned in trained.items()
    }
    if certificates[best].price is None:
        say(f"  {certificates[best].sentence}", style="red")
    allocator = Allocator(
        menu=workspace.menu(),
        controller=trained[best].controller,
        controller_name=best,
        projection=trained[best].projection,
        certificate=certificates[best],
        decoding=workspace.decoding,
        fingerprint=workspace.fingerprint,
        model_source=config.model.source,
        stand_ins=None if workspace.stand_ins.is_empty else workspace.stand_ins,
        acceptance=acceptance_rates(workspace.labels.read(workspace.labelled, workspace.menu())),
        drift=_drift_alarm(trained[best], certificates[best], table, config),
        outliers=outliers,
        chat=_chat_format(workspace),
    )
    certificate = replace(allocator.certificate, assumes=optional_parts(allocator))
    replace(allocator, certificate=certificate).save_pretrained(workspace.path("allocator"))
    data = {"best": best, "certificates": {name: _as_dict(found) for name, found in certificates.items()}}
    write_atomically(workspace.path("calibration.json"), json.dumps(data, indent=2) + "\n")
    return workspace.path("allocator")


def tested(trained: Mapping[str, Learned], outliers: OutlierTest | None) -> dict[str, Learned]:
    """Controllers that leave outliers to the full plan."""
    return {name: replace(learned, outliers=outliers) for name, learned in trained.items()}


def certified(predicted: np.ndarray, table: Table, workspace: Workspace, alpha: float | None = None) -> Certificate:
    """Learn-then-Test on a table, for a controller that predicted `predicted` [N, K] there.

    Args:
        workspace: of the run.
        alpha: another bound than the configuration's.
    """
    config = workspace.config
    calibration = config.calibration
    return certify(
        lambda price: losses_at(predicted, table.kept, table.budgets, price),
        alpha=calibration.alpha if alpha is None else alpha,
        delta=calibration.delta,
        risk=calibration.risk,
        full=table.full,
        tasks=table.tasks.tolist(),
        per_task=calibration.per_task,
        tolerance=config.label.tolerance,
        prompts_hash=hashlib.sha256("".join(prompt.hash for prompt in table.prompts).encode()).hexdigest()[:16],
        decoding=str(workspace.decoding),
        chat_template=max(prompt.template for prompt in table.prompts),  # those given as they are have an empty one
    )


def _drift_alarm(learned: Learned, certificate: Certificate, table: Table, config: Config) -> DriftAlarm:
    projected = learned.projection(table.features)
    chosen = choose(learned.predict(table.features), table.budgets, certificate.price)
    return DriftAlarm(drift_scores(projected, table.budgets[chosen]), config.calibration.false_alarms)


def _chat_format(workspace: Workspace) -> ChatFormat | None:
    """None where every prompt was given as it is, so that those to come are too."""
    is_rendered = [bool(prompt.template) for prompt in workspace.labelled]
    if workspace.chat_template is None or not any(is_rendered):
        return None
    return ChatFormat.of(workspace.chat_template, workspace.tokenizer, for_all=all(is_rendered))


def _as_dict(certificate: Certificate) -> dict[str, object]:
    return {**asdict(certificate), "sentence": certificate.sentence}
