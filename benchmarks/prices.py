"""Prices that are valid for several controllers or bounds side by side, without a certificate each."""

from __future__ import annotations

from controller.base import Floats
from controller.certificate.calibration import PricePath, valid_price
from controller.certificate.certificate import alpha_of
from pipelines.config.learning_sections import CalibrationSection
from pipelines.evaluation.learning_table import Table


def price_of(
    predicted: Floats,
    table: Table,
    calibration: CalibrationSection,
    keep: float | None = None,
    *,
    together: int | None = None,
    start: int = 0,
) -> float | None:
    """The price that is valid for a controller, by the same test as a run's certificate.

    Args:
        predicted: losses that the controller expects [N, K].
        table: the N calibration prompts.
        calibration: the bound, the confidence, the risk.
        keep: the bound; None for the first of `calibration.keep`.
        together: how many prices, of several controllers or bounds, are to be valid side by side; None for one at each
            value of `calibration.keep`. They share `calibration.delta` in equal parts (Bonferroni), so that any of them
            can be chosen afterwards. A price found with 1 is valid only where it was named before: the best of two at
            delta 10% fails in 16% of the cases.
        start: see `pipelines.stages.calibrate.first_tested`.
    """
    return valid_price(
        PricePath.of(predicted, table.losses, table.rule, table.labelled),
        calibration.alpha if keep is None else alpha_of(keep),
        calibration.delta_of_one if together is None else calibration.delta / together,
        table.tasks if calibration.per_task else None,
        risk=calibration.risk,
        full=table.full,
        groups=table.groups,
        start=start,
    )
