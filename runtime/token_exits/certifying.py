"""One threshold for whole answers: Learn-then-Test along thresholds, safest first (CALM, Schuster et al. 2022, arXiv
2207.07061, section 4).

The steps were set on other prompts. The first threshold that fails ends the test, so that the choice among them is
covered by delta.

Shapes: `T` thresholds, safest first, `n` calibration prompts.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from controller.certificate.calibration import last_valid, price_p_values
from controller.certificate.groups import Names
from controller.certificate.risks import Risk

Floats = NDArray[np.float64]


def losses_of(risk: Risk, scores: Floats, full: Floats, tolerance: float = 0.0) -> Floats:
    """The loss of each answer [T, n], as that of a plan would be.

    Args:
        scores: of answers under each threshold [T, n].
        full: the full model's [n].
        risk: which loss.
        tolerance: how much lower the score of a sufficient answer may be.
    """
    lost = full - scores
    if risk == "insufficient":
        return (lost > tolerance).astype(np.float64)
    return lost if risk == "mean_score" else np.clip(lost, 0.0, 1.0)


def valid_step(
    losses: Floats,
    full: Floats,
    *,
    alpha: float,
    delta: float,
    risk: Risk,
    groups: Names | None = None,
    shortens: NDArray[np.bool_] | None = None,
) -> int | None:
    """The place of the boldest threshold whose mean loss is at most `alpha` with probability 1 - `delta`; None, and
    then no token leaves, where already the safest fails or where no token leaves at that threshold.

    Args:
        losses: [T, n].
        full: the full model's scores [n].
        alpha, delta, risk, groups: as in `controller.certificate.calibration.valid_price`.
        shortens: whether any token leaves at each threshold [T]; None where some does at all of them.
    """
    index = last_valid(price_p_values(losses, alpha, delta, risk, full=full, groups=groups), delta)
    return None if index is None or not (shortens is None or shortens[index]) else index
