"""P-values of "the mean loss exceeds alpha" for the losses that are certified, valid for any number of prompts.

Shapes: `T` candidate prices, `n` calibration prompts, independent draws from one population.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from backbone.errors import InputError
from controller.certificate.betting import betting_p_values
from controller.certificate.risks import MOST_KEPT, RISKS, Risk

Floats = NDArray[np.float64]


class CalibrationError(InputError):
    """A certificate was asked for that these losses, or these numbers, cannot give."""


def p_values(losses: Floats, alpha: float, delta: float, risk: Risk, full: Floats | None = None) -> Floats:
    """P-values [T] of "the mean loss exceeds alpha" from losses [T, n]; for `mean_score` of "it exceeds alpha times the
    full model's mean score".

    That is "the mean of keep x full model's score - score is above 0", where keep is 1 - alpha. The terms lie in
    [-1, 1], and in [-1, keep] where more is to be kept than the full model has. They are moved to [0, 1], and 0 with
    them. Both means are tested together, so the full model's needs no bound of its own.

    Args:
        losses: of n prompts under each of T prices; 0 or 1 for `insufficient`, in [0, 1] for `score_lost`, in [-1, 1]
            for `mean_score`.
        alpha: the bound, in (0, 1); for `mean_score` below 1, at most 0 where the full model's score or more is kept.
        delta: the level that the bets are made for, in (0, 1); the p-values are valid at every other one too.
        risk: which loss it is. Said, not guessed: bounded losses that happen to be all 0 or 1 are no coin tosses.
        full: the full model's score of each prompt [n], in [0, 1], for `mean_score`.

    Raises:
        CalibrationError: an alpha, a delta, a risk, losses or scores outside of these ranges, or missing scores.
    """
    _check(losses, alpha, delta, risk)
    if risk == "insufficient":
        return binomial_p_values(losses, alpha)
    if risk == "score_lost":
        return betting_p_values(losses, alpha, delta)
    width = 1 + max(1.0, 1 - alpha)
    return betting_p_values((1 + losses - alpha * _checked_full(full, losses)) / width, 1 / width, delta)


def binomial_p_values(losses: Floats, alpha: float) -> Floats:
    """For 0/1 losses [T, n]: P(Binomial(n, alpha) <= losses seen), by MAPIE.

    Source: Angelopoulos et al. 2021, Learn then Test (arXiv 2110.01052), section 3.2: Hoeffding-Bentkus, whose Bentkus
    half is the binomial tail itself, and always the smaller one, where the loss is 0/1.
    """
    from mapie.risk_control.methods import compute_hoeffding_bentkus_p_value

    # a hair less, since MAPIE rounds n * mean up to a count, and 200 * (7 / 200) is a hair more than 7
    means = losses.mean(1) * (1 - 1e-12)
    values: Floats = compute_hoeffding_bentkus_p_value(means, losses.shape[1], alpha, binary=True)[:, 0]
    return values


def _check(losses: Floats, alpha: float, delta: float, risk: str) -> None:
    if risk not in RISKS:
        raise CalibrationError(f"there is no risk {risk!r}; known are {', '.join(RISKS)}")
    lowest = 1 - MOST_KEPT if risk == "mean_score" else 0
    for name, value, least in (("alpha", alpha, lowest), ("delta", delta, 0)):
        if not least < value < 1:
            raise CalibrationError(f"{name} is {value}; it must lie between {least} and 1, both excluded")
    if losses.shape[1] == 0:
        raise CalibrationError("there are no calibration prompts: nothing can be certified from 0 losses")
    least = -1 if risk == "mean_score" else 0
    wrong = losses[~((losses >= least) & (losses <= 1))]  # also where it is NaN
    if len(wrong):
        raise CalibrationError(
            f"{len(wrong)} losses are outside of [{least}, 1], the first is {wrong[0]}; scores lie in [0, 1]"
        )
    if risk == "insufficient" and len(between := losses[(losses > 0) & (losses < 1)]):
        raise CalibrationError(
            f"the risk 'insufficient' counts losses of 0 or 1, here is one of {between[0]:g}: ask for 'score_lost'"
        )


def _checked_full(full: Floats | None, losses: Floats) -> Floats:
    if full is None or full.shape != losses.shape[1:]:
        given = "none" if full is None else f"{len(full)}"
        raise CalibrationError(
            f"the risk 'mean_score' needs the full model's score of each of {losses.shape[1]} prompts, {given} were "
            "given"
        )
    if len(wrong := full[~((full >= 0) & (full <= 1))]):
        raise CalibrationError(f"the full model's scores must lie in [0, 1], one of them is {wrong[0]}")
    return full
