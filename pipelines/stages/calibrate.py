"""Stage 7: the labels that the best controller's prices ask for, its certified price, and its allocator."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backbone.files import write_atomically
from controller.base import Floats, choose
from controller.certificate.calibration import PricePath, certify, first_price, on_path, valid_price
from controller.certificate.certificate import Certificate, alpha_of
from controller.certificate.drift import DriftAlarm, drift_scores
from controller.certificate.outliers import OutlierTest
from controller.feature_sets import WIDE
from controller.learning import FittedPredictor
from oracle.decoding import Decoding
from oracle.labels.reader import acceptance_rates
from pipelines.config import Config
from pipelines.config.learning_sections import CalibrationSection
from pipelines.evaluation.learning_table import Table
from pipelines.evaluation.pooled_gain import first_tested
from pipelines.ray.distributed import Workers
from pipelines.run.progress import say
from pipelines.run.workspace import IN_FULL, Workspace
from pipelines.stages.label import label_cells
from pipelines.stages.train import load_trained, tuned_settings
from runtime.allocator import Allocator
from runtime.chat_format import ChatFormat
from runtime.parts import OperatingPoint
from runtime.saving.allocator_checks import optional_parts


def run(config: Config, workers: Workers | None = None) -> Path:
    """Write `calibration.json` with the best controller's certificates, and save that controller as `allocator/`.

    Which controller is best was decided on the other prompts, so the calibrate split has seen no choice but the prices.
    The allocator runs at the first value of `calibration.keep`, or at the highest that is certified where the first is
    not.
    """
    workspace = Workspace.of(config)
    best = json.loads(workspace.path("tuning.json").read_text())["best"]
    learned, fit = load_trained(workspace)[best], workspace.table("train", "tune")
    tuned = {prompt.id for prompt in workspace.splits["tune"]}
    held = np.array([prompt.id in tuned for prompt in fit.prompts])
    learned = replace(learned, outliers=outlier_test(learned, fit, held, config))
    table = _labelled_table(workspace, learned, workers)
    predicted, keep = learned.predict(table.features), config.calibration.keep
    starts = first_tested(tuned_settings(workspace)[best], fit.features, fit, keep)
    every = [
        certified(predicted, table, config, workspace.decoding, level, start)
        for level, start in zip(keep, starts, strict=True)
    ]
    for certificate in every:
        if certificate.price is None:
            say(f"  {certificate.sentence}", style="red")
    valid = sorted((found for found in every if found.price is not None), key=lambda found: -found.keep)
    certificate = every[0] if every[0].price is not None or not valid else valid[0]
    allocator = Allocator(
        menu=workspace.menu(),
        controller=learned.controller,
        controller_name=best,
        projection=learned.projection,
        certificate=certificate,
        decoding=workspace.decoding,
        fingerprint=workspace.fingerprint,
        model_source=config.model.source,
        healing=None if workspace.healing.is_empty else workspace.healing,
        acceptance=acceptance_rates(workspace.labels.read(workspace.labelled_of(*IN_FULL), workspace.menu())),
        drift=_drift_alarm(learned, certificate, table, config),
        others=tuple(
            OperatingPoint(found, _drift_alarm(learned, found, table, config))
            for found in valid
            if found is not certificate
        ),
        outliers=learned.outliers,
        chat=_chat_format(workspace),
    )
    allocator = allocator.assuming(optional_parts(allocator))
    allocator.save_pretrained(workspace.path("allocator"))
    data = {
        "best": best,
        "certificate": described(allocator.certificate),
        "certificates": [described(found) for found in every],
    }
    write_atomically(workspace.path("calibration.json"), json.dumps(data, indent=2) + "\n")
    return workspace.path("allocator")


def _labelled_table(workspace: Workspace, learned: FittedPredictor, workers: Workers | None) -> Table:
    """The calibrate prompts, labelled in full and under the plans that some price chooses for them."""
    cells = on_path(learned.predict(workspace.features("calibrate")), np.array(workspace.menu().budgets))
    label_cells(workspace, "calibrate", cells, workers)
    return workspace.table("calibrate", wanted=cells)


def outlier_test(learned: FittedPredictor, fit: Table, held: NDArray[np.bool_], config: Config) -> OutlierTest | None:
    """The test that goes with a controller, of the wide features that it reads, or of all without such.

    None where `calibration.outliers` is 0 or there are no prompts on either side.

    Args:
        fit: the prompts that it learned from.
        held: those of them that the threshold is made from [N].
        config: the rate, `calibration.outliers`, is read.
    """
    rate = config.calibration.outliers
    if not rate or (~held).sum() < 2 or not held.any():
        return None
    known, others = fit.rows(np.flatnonzero(~held)).features, fit.rows(np.flatnonzero(held)).features
    read = learned.projection.sets
    return OutlierTest.fit(known, others, [name for name in read if name in WIDE] or read, rate)


def described(certificate: Certificate) -> dict[str, Any]:
    """A certificate for JSON."""
    return {**asdict(certificate), "sentence": certificate.sentence}


def certified(
    predicted: Floats, table: Table, config: Config, decoding: Decoding, keep: float, start: int
) -> Certificate:
    """The certificate of a controller that was named before, by Learn-then-Test on a table.

    Args:
        predicted: what the controller expects plans to keep [N, K].
        table: the N calibration prompts.
        config: of the run.
        decoding: how the answers were generated.
        keep: one of `calibration.keep`.
        start: see `first_tested`.
    """
    calibration = config.calibration
    return certify(
        PricePath.of(predicted, table.losses, table.budgets, table.labelled),
        keep=keep,
        start=start,
        levels=tuple(calibration.keep),
        delta=calibration.delta,
        risk=calibration.risk,
        full=table.full,
        tasks=table.tasks,
        groups=table.groups,
        per_task=calibration.per_task,
        tolerance=config.label.tolerance,
        left_out=table.left_out,
        prompts_hash=hashlib.sha256("".join(prompt.hash for prompt in table.prompts).encode()).hexdigest()[:16],
        decoding=str(decoding),
        chat_template=max(prompt.template for prompt in table.prompts),  # those given as they are have an empty one
    )


def price_of(
    predicted: Floats,
    table: Table,
    calibration: CalibrationSection,
    keep: float | None = None,
    *,
    together: int | None = None,
    start: int = 0,
) -> float | None:
    """The price that is valid for a controller, by the same test as `certified`, without the certificate.

    Args:
        predicted: what the controller expects plans to keep [N, K].
        table: the N calibration prompts.
        calibration: the bound, the confidence, the risk.
        keep: the bound; None for the first of `calibration.keep`.
        together: how many prices, of several controllers or bounds, are to be valid side by side; None for one at each
            value of `calibration.keep`. They share `calibration.delta` in equal parts (Bonferroni), so that any of them
            can be chosen afterwards. A price found with 1 is valid only where it was named before: the best of two at
            delta 10% fails in 16% of the cases.
        start: see `first_tested`.
    """
    return valid_price(
        PricePath.of(predicted, table.losses, table.budgets, table.labelled),
        calibration.alpha if keep is None else alpha_of(keep),
        calibration.delta_of_one if together is None else calibration.delta / together,
        table.tasks if calibration.per_task else None,
        risk=calibration.risk,
        full=table.full,
        groups=table.groups,
        start=start,
    )


def price_out_of_fold(seen: Floats, fit: Table, calibration: CalibrationSection, keep: float) -> float | None:
    """The price that is tested for a policy on the prompts that it learned from, decided out of fold.

    It stands for what a certificate would allow where the calibrate split is labelled for another policy. The sequence
    begins where it would on these very prompts, so that it certifies nothing.

    Args:
        seen: what is expected out of fold of the prompts of `fit` [N, K].
        fit: the prompts to train and to tune.
        calibration: the confidence and the risk.
        keep: the bound.
    """
    start = first_price(PricePath.of(seen, fit.losses, fit.budgets), alpha_of(keep), fit.full)
    return price_of(seen, fit, calibration, keep, start=start)


def _drift_alarm(learned: FittedPredictor, certificate: Certificate, table: Table, config: Config) -> DriftAlarm:
    projected = learned.projection(table.features)
    chosen = choose(learned.predict(table.features), table.budgets, certificate.price)
    return DriftAlarm(drift_scores(projected, table.budgets[chosen]), config.calibration.false_alarms)


def _chat_format(workspace: Workspace) -> ChatFormat | None:
    """None where every prompt was given as it is, so that those to come are too."""
    is_rendered = [bool(prompt.template) for prompt in workspace.labelled]
    if workspace.chat_template is None or not any(is_rendered):
        return None
    return ChatFormat.of(workspace.chat_template, workspace.tokenizer, for_all=all(is_rendered))
