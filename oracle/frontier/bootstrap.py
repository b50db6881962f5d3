"""How far a figure could be off if other prompts had been drawn: percentile intervals over redrawn prompts."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

REPEATS = 1000
"""Redrawn sets of prompts."""


def bootstrap_interval(
    statistic: Callable[[NDArray[np.intp]], float],
    n: int,
    *,
    repeats: int = REPEATS,
    level: float = 0.9,
    seed: int = 0,
) -> tuple[float, float]:
    """The percentile interval (low, high) of a statistic of n prompts; see `bootstrap_band`."""
    low, high = bootstrap_band(lambda drawn: np.array([statistic(drawn)]), n, repeats=repeats, level=level, seed=seed)
    return float(low[0]), float(high[0])


def bootstrap_band(
    statistics: Callable[[NDArray[np.intp]], NDArray[np.float64]],
    n: int,
    *,
    repeats: int = REPEATS,
    level: float = 0.9,
    seed: int = 0,
) -> NDArray[np.float64]:
    """Percentile intervals [2, S] of S statistics of n prompts, drawn anew from them with replacement.

    Source: Efron and Tibshirani 1993, An Introduction to the Bootstrap, section 13.3. It covers the draw of the prompts
    and nothing else: a statistic that flatters flatters in every draw.

    Args:
        statistics: indices [n] of the prompts drawn -> values [S]. Draws with NaN, where a value is not defined, are
            left out, so that its interval is of the draws where it is; both ends are NaN if there are none.
        n: number of prompts.
        repeats: number of draws.
        level: share of the draws inside the interval.
        seed: another seed draws others.
    """
    draws = np.random.default_rng(seed)
    values = np.array([statistics(draws.integers(0, n, n)) for _ in range(repeats)])
    return np.array([percentile_interval(column, level) for column in values.T]).T


def percentile_interval(values: NDArray[np.float64], level: float) -> tuple[float, float]:
    """The middle share `level` of the values that are not NaN, (low, high); NaN where all are."""
    defined = values[~np.isnan(values)]
    if not len(defined):
        return float("nan"), float("nan")
    low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
