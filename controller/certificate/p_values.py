"""P-values of "the mean loss exceeds alpha", valid for any number of prompts.

Shapes: `T` candidate prices, `n` calibration prompts, independent draws from one population.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from controller.certificate.risks import MOST_KEPT, RISKS, CalibrationError, Floats, Risk

LARGEST_BET = 0.9
"""Share of the largest bet that can never lose all wealth. At 1 a single lost answer ends the test. At 3/4, as in
Waudby-Smith and Ramdas, small losses need a third more prompts. Fixed on simulated losses, not on ours."""

SURPLUS = 1.25
"""The wealth that bets aim at, in 1 / delta. Bets that aim at 1 end just below as often as not. Fixed on simulated
losses."""

MOST_COUNTED, MOST_TESTED = 10_000_000, 30_000
"""Prompts up to which `fewest_prompts` looks; counts have a closed form, martingales run prompt by prompt."""


def p_values(losses: Floats, alpha: float, delta: float, risk: Risk, full: Floats | None = None) -> Floats:
    """P-values [T] of "the mean loss exceeds alpha".

    For `mean_score` alpha is a share of the full model's mean score. The hypothesis is "the mean of keep x full model's
    score - score is above 0", where keep is 1 - alpha. The terms lie in [-1, max(1, keep)] and are scaled to [0, 1],
    and 0 with them. The full model's mean needs no bound of its own.

    Args:
        losses: of n prompts at each of T prices; 0 or 1 for `insufficient`, in [0, 1] for `score_lost`, in [-1, 1] for
            `mean_score`.
        alpha: the bound, in (0, 1); for `mean_score` below 1, at most 0 where the full model's score or more is kept.
        delta: the level that the bets aim at, in (0, 1); the p-values are valid at every level.
        risk: which loss it is; bounded losses that happen to be all 0 or 1 are no coin tosses.
        full: the full model's score of each prompt [n], in [0, 1], for `mean_score`.

    Raises:
        CalibrationError: an alpha, a delta, a risk, losses or scores outside of these ranges, or missing scores.
    """
    _check(losses, alpha, delta, risk)
    if risk == "insufficient":
        return binomial_p_values(losses, alpha)
    if risk == "score_lost":
        return martingale_p_values(losses, alpha, delta)
    width = 1 + max(1.0, 1 - alpha)
    return martingale_p_values((1 + losses - alpha * _checked_full(full, losses)) / width, 1 / width, delta)


def binomial_p_values(losses: Floats, alpha: float) -> Floats:
    """P(Binomial(n, alpha) <= losses seen) for 0/1 losses [T, n], by MAPIE.

    Source: Angelopoulos et al. 2021, Learn then Test (arXiv 2110.01052), section 3.2. The Bentkus half of
    Hoeffding-Bentkus is the binomial tail, and always the smaller one, where the loss is 0/1.
    """
    from mapie.risk_control.methods import compute_hoeffding_bentkus_p_value

    # a hair less, since MAPIE rounds n * mean up to a count, and 200 * (7 / 200) is a hair more than 7
    means = losses.mean(1) * (1 - 1e-12)
    values: Floats = compute_hoeffding_bentkus_p_value(means, losses.shape[1], alpha, binary=True)[:, 0]
    return values


def martingale_p_values(losses: Floats, alpha: float, delta: float) -> Floats:
    """1 / largest wealth of a test martingale, for losses [T, n] in [0, 1].

    The martingale starts with wealth 1 and bets at every prompt that its loss is below alpha. If the mean loss exceeds
    alpha every bet is unfavourable, so by Ville's inequality the wealth ever reaches 1 / p with probability at most p,
    whatever the bets. Unlike Hoeffding-Bentkus it gains from a small variance.

    The bets have the best chance to reach wealth `SURPLUS` / delta by the last prompt, if losses were normal with the
    variance seen so far. Once that is reached the bets end, so p-values stop near `delta` / `SURPLUS`. They are valid
    at every level, but have power at `delta` alone. A family of m tests runs each at the smallest level that its
    procedure asks for, `delta` / m for Bonferroni and for Holm's first step.

    Source: Waudby-Smith and Ramdas 2024, Estimating means of bounded random variables by betting (JRSS-B 86(1), arXiv
    2010.09686), section 4, one-sided as in Bates et al. 2021 (arXiv 2101.02703), section 3.1.3; bets with a deadline:
    Browne 1999, Reaching goals by a deadline (Advances in Applied Probability 31(2)), theorem 3.1.
    """
    from scipy.special import ndtri

    n = losses.shape[1]
    # Shuffled, since a table sorted by task shows its easy tasks first; by a fixed seed, so that nobody draws again.
    ordered = losses[:, np.random.default_rng(0).permutation(n)]
    deviations = np.sqrt(_variances(ordered))
    wealth, largest = np.ones(len(losses)), np.ones(len(losses))
    for place in range(n):
        chance = np.clip(delta * wealth / SURPLUS, 1e-300, 1.0)
        slope = np.exp(-(ndtri(chance) ** 2) / 2) / math.sqrt(2 * math.pi)
        bets = slope / (chance * deviations[:, place] * math.sqrt(n - place))
        wealth = wealth * (1 - np.minimum(bets, LARGEST_BET / (1 - alpha)) * (ordered[:, place] - alpha))
        largest = np.maximum(largest, wealth)
    return np.asarray(1 / largest)


def _variances(losses: Floats) -> Floats:
    """Variance estimates before each loss [T, n], starting from the largest, 1/4."""
    count = np.arange(2, losses.shape[1] + 2)
    means = (0.5 + np.cumsum(losses, axis=1)) / count
    after = (0.25 + np.cumsum((losses - means) ** 2, axis=1)) / count
    return np.concatenate([np.full((len(losses), 1), 0.25), after[:, :-1]], axis=1)


@lru_cache(maxsize=64)
def fewest_prompts(
    alpha: float, delta: float, risk: Risk = "insufficient", observed_risk: float = 0.0, full_score: float = 1.0
) -> int:
    """Fewest calibration prompts that certify `alpha` at `delta`, given `observed_risk`.

    Except for `insufficient` this is the best case, every prompt losing the same; losses that vary take more.

    Args:
        full_score: the full model's mean score, for `mean_score`: the losses are in shares of it.

    Returns:
        The number, above a thousand to a thousandth.

    Raises:
        CalibrationError: an observed risk that is not below alpha, or more prompts than can be looked at.
    """
    if not observed_risk < alpha or (observed_risk < 0 and risk != "mean_score"):
        raise CalibrationError(f"an observed risk of {observed_risk:g} can never certify a bound of {alpha:g}")
    low, high, most = 0, 1, MOST_COUNTED if risk == "insufficient" else MOST_TESTED
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
