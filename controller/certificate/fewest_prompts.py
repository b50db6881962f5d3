"""How many calibration prompts a certificate takes at least."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from controller.certificate.p_values import CalibrationError, p_values
from controller.certificate.risks import Risk

MOST_COUNTED, MOST_PLAYED = 10_000_000, 30_000
"""Prompts that are looked at: a count is a formula, a game is played prompt by prompt."""


@lru_cache(maxsize=64)
def fewest_prompts(
    alpha: float, delta: float, risk: Risk = "insufficient", observed_risk: float = 0.0, full_score: float = 1.0
) -> int:
    """How many calibration prompts it takes to certify `alpha` at `delta` when the mean loss seen is `observed_risk`.

    But for `insufficient` this is the best case, every prompt losing the same; losses that vary take more.

    Args:
        full_score: the full model's mean score, for `mean_score`: in shares of it are the losses.

    Returns:
        The number, above a thousand to a thousandth.

    Raises:
        CalibrationError: the observed risk is not below alpha, so that no number suffices, or it takes more than can be
            looked at.
    """
    if not observed_risk < alpha or (observed_risk < 0 and risk != "mean_score"):
        raise CalibrationError(f"an observed risk of {observed_risk:g} can never certify a bound of {alpha:g}")
    low, high, most = 0, 1, MOST_COUNTED if risk == "insufficient" else MOST_PLAYED
    while not _certifies(high, alpha, delta, risk, observed_risk, full_score):
        low, high = high, high * 2
        if high > most:
            raise CalibrationError(
                f"certifying {alpha:g} at an observed risk of {observed_risk:g} takes over {most} prompts; "
                "ask for a larger alpha"
            )
    while high - low > max(1, low // 1000):
        middle = (low + high) // 2
        suffices = _certifies(middle, alpha, delta, risk, observed_risk, full_score)
        low, high = (low, middle) if suffices else (middle, high)
    return high


def _certifies(n: int, alpha: float, delta: float, risk: Risk, observed_risk: float, full_score: float) -> bool:
    if risk == "insufficient":
        losses = (np.arange(n) < math.ceil(observed_risk * n)).astype(np.float64)
    else:
        losses = np.full(n, observed_risk * (full_score if risk == "mean_score" else 1.0))
    return bool(p_values(losses[None], alpha, delta, risk, np.full(n, full_score))[0] <= delta)
