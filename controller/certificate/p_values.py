"""P-values of "the mean loss exceeds alpha" for the two losses that are certified, valid for any number of prompts.

Shapes: `T` candidate prices, `n` calibration prompts, independent draws from one population.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from backbone.errors import InputError

Floats = NDArray[np.float64]

Risk = Literal["insufficient", "score_lost"]
"""The loss of a prompt. `insufficient`: 1 where the plan's answer is no longer sufficient, else 0. `score_lost`:
max(0, full model's score - score), in [0, 1]."""
RISKS: tuple[Risk, ...] = get_args(Risk)

BOLDNESS = 0.9
"""Share of the largest bet that can never lose everything. At 1 a single lost answer ends the game; at Waudby-Smith and
Ramdas' 3/4 small losses need a third more prompts. Fixed on simulated losses, not on ours."""

MAX_PROMPTS = 10_000_000


class CalibrationError(InputError):
    """A certificate was asked for that these losses, or these numbers, cannot give."""


def p_values(losses: Floats, alpha: float, delta: float, risk: Risk) -> Floats:
    """P-values [T] of "the mean loss exceeds alpha" from losses [T, n].

    Args:
        losses: of n prompts under each of T prices; 0 or 1 for `insufficient`, in [0, 1] for `score_lost`.
        alpha: the bound, in (0, 1).
        delta: the level that the bets are made for, in (0, 1); the p-values are valid at every other one too.
        risk: which loss it is. Said, not guessed: bounded losses that happen to be all 0 or 1 are no coin tosses.

    Raises:
        CalibrationError: an alpha, a delta, a risk or losses outside of these ranges.
    """
    _check(losses, alpha, delta, risk)
    return binomial_p_values(losses, alpha) if risk == "insufficient" else betting_p_values(losses, alpha, delta)


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


def betting_p_values(losses: Floats, alpha: float, delta: float) -> Floats:
    """For losses [T, n] in [0, 1]: 1 / the most that a gambler who starts with 1 ever owned.

    The gambler bets at every prompt that its loss will be below alpha, more boldly the less the losses before it
    varied. If the mean loss exceeds alpha every bet is unfavourable, so by Ville's inequality the capital ever reaches
    1 / p with probability at most p. Unlike Hoeffding-Bentkus this gains from a small variance.

    Source: Waudby-Smith and Ramdas 2024, Estimating means of bounded random variables by betting (JRSS-B 86(1), arXiv
    2010.09686), section 4, with the one-sided bets of Bates et al. 2021, Distribution-free, risk-controlling
    prediction sets (arXiv 2101.02703), section 3.1.3.
    """
    losses = losses[:, _order(losses.shape[1])]
    bets = np.minimum(BOLDNESS / (1 - alpha), np.sqrt(2 * math.log(1 / delta) / (losses.shape[1] * _variances(losses))))
    capital = np.cumsum(np.log1p(-bets * (losses - alpha)), axis=1)
    return np.asarray(np.exp(-np.maximum(capital.max(axis=1), 0.0)))


def _order(n: int) -> NDArray[np.intp]:
    """The order of the bets [n]: shuffled, or a table sorted by task would show the gambler its easy tasks first, whose
    mean is not the one tested; and by a fixed seed, so that nobody can draw again."""
    return np.random.default_rng(0).permutation(n)


def _variances(losses: Floats) -> Floats:
    """[T, n]: what was known of the variance before each loss, starting from 1/4, the largest that losses can have."""
    count = np.arange(2, losses.shape[1] + 2)
    means = (0.5 + np.cumsum(losses, axis=1)) / count
    after = (0.25 + np.cumsum((losses - means) ** 2, axis=1)) / count
    return np.concatenate([np.full((len(losses), 1), 0.25), after[:, :-1]], axis=1)


@lru_cache(maxsize=64)
def fewest_prompts(alpha: float, delta: float, risk: Risk = "insufficient", observed_risk: float = 0.0) -> int:
    """How many calibration prompts it takes to certify `alpha` at `delta` when the mean loss seen is `observed_risk`.

    For `score_lost` this is the best case, every prompt losing the same; losses that vary take more.

    Raises:
        CalibrationError: the observed risk is not below alpha, so that no number suffices.
    """
    if not 0 <= observed_risk < alpha:
        raise CalibrationError(f"an observed risk of {observed_risk:g} can never certify a bound of {alpha:g}")
    low, high = 0, 1
    while not _certifies(high, alpha, delta, risk, observed_risk):
        low, high = high, high * 2
        if high > MAX_PROMPTS:
            raise CalibrationError(
                f"certifying {alpha:g} at an observed risk of {observed_risk:g} takes over {MAX_PROMPTS} prompts; "
                "ask for a larger alpha"
            )
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if _certifies(middle, alpha, delta, risk, observed_risk) else (middle, high)
    return high


def _certifies(n: int, alpha: float, delta: float, risk: Risk, observed_risk: float) -> bool:
    lost = math.ceil(observed_risk * n)
    losses = np.arange(n) < lost if risk == "insufficient" else np.full(n, observed_risk)
    return bool(p_values(losses[None].astype(np.float64), alpha, delta, risk)[0] <= delta)


def _check(losses: Floats, alpha: float, delta: float, risk: str) -> None:
    for name, value in (("alpha", alpha), ("delta", delta)):
        if not 0 < value < 1:
            raise CalibrationError(f"{name} is {value}; it must lie between 0 and 1, both excluded")
    if risk not in RISKS:
        raise CalibrationError(f"there is no risk {risk!r}; known are {', '.join(RISKS)}")
    if losses.shape[1] == 0:
        raise CalibrationError("there are no calibration prompts: nothing can be certified from 0 losses")
    wrong = losses[~((losses >= 0) & (losses <= 1))]  # also where it is NaN
    if len(wrong):
        raise CalibrationError(
            f"{len(wrong)} losses are outside of [0, 1], the first is {wrong[0]}; scores lie in [0, 1]"
        )
    if risk == "insufficient" and len(between := losses[(losses > 0) & (losses < 1)]):
        raise CalibrationError(
            f"the risk 'insufficient' counts losses of 0 or 1, here is one of {between[0]:g}: ask for 'score_lost'"
        )
