"""A game against "the mean loss exceeds alpha" that nobody can expect to win if it does.

Shapes: `T` candidate prices, `n` calibration prompts, independent draws from one population.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

BOLDNESS = 0.9
"""Share of the largest bet that can never lose everything. At 1 a single lost answer ends the game; at Waudby-Smith and
Ramdas' 3/4 small losses need a third more prompts. Fixed on simulated losses, not on ours."""

SURPLUS = 1.25
"""The goal that bets are made for, in 1 / delta: above 1, since bets that only just lead there end just below it as
often as not. Fixed on simulated losses, like `BOLDNESS`."""


def betting_p_values(losses: Floats, alpha: float, delta: float) -> Floats:
    """For losses [T, n] in [0, 1]: 1 / the most that a gambler who starts with 1 ever owned.

    The gambler bets at every prompt that its loss will be below alpha. If the mean loss exceeds alpha every bet is
    unfavourable, so by Ville's inequality the capital ever reaches 1 / p with probability at most p, whatever the bets.
    Unlike Hoeffding-Bentkus this gains from a small variance.

    The bets are those with the best chance to reach a goal, `SURPLUS` / delta, by the last prompt: the capital in
    shares of the goal is taken for that chance, and the bet is by how much a change of the losses' sum would change it,
    if losses were normal, with the variance seen so far, for the prompts that are left. What is owned decides anew
    before every prompt, so bad luck makes bolder.

    Once the goal is reached nothing more is bet, so that p-values stop near `delta` / `SURPLUS`, .08 for a delta of .1.
    They are valid at every level, but have power at `delta` alone. A family of m tests needs smaller ones: play each
    at the smallest level that the family's procedure asks for, `delta` / m for Bonferroni and for Holm's first step.

    Source: Waudby-Smith and Ramdas 2024, Estimating means of bounded random variables by betting (JRSS-B 86(1), arXiv
    2010.09686), section 4, with the one-sided bets of Bates et al. 2021, Distribution-free, risk-controlling
    prediction sets (arXiv 2101.02703), section 3.1.3; bets towards a goal by a deadline: Browne 1999, Reaching goals by
    a deadline (Advances in Applied Probability 31(2)), theorem 3.1.
    """
    from scipy.special import ndtri

    n = losses.shape[1]
    ordered = losses[:, _order(n)]
    deviations = np.sqrt(_variances(ordered))
    capital, most = np.ones(len(losses)), np.ones(len(losses))
    for place in range(n):
        chance = np.clip(delta * capital / SURPLUS, 1e-300, 1.0)
        quantile = ndtri(chance)
        slope = np.exp(-(quantile**2) / 2) / math.sqrt(2 * math.pi)
        bets = slope / (chance * deviations[:, place] * math.sqrt(n - place))
        capital = capital * (1 - np.minimum(bets, BOLDNESS / (1 - alpha)) * (ordered[:, place] - alpha))
        most = np.maximum(most, capital)
    return np.asarray(1 / most)


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
