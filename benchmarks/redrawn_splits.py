"""Does the certificate hold? Calibrate anew on prompts drawn from the labelled ones, many times, and look at them all.

The labelled prompts stand for the population, so the calibration prompts are drawn from them with replacement, as
independent draws from a population are. Half of a pool drawn without replacement is nearer to the pool than that: a
certificate without slack that fails in 10% of the cases would seem to fail in 3.5% (1.28 x sqrt(2) standard
deviations).

Shapes: `N` pooled prompts, `K` plans, `T` prices.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from controller.base import ChoiceRule
from controller.certificate.calibration import choices, last_valid, price_p_values
from controller.certificate.risks import CalibrationError, Risk, loss_scale

Floats = NDArray[np.float64]
Rows = NDArray[np.intp]


@dataclass(frozen=True, slots=True)
class Draw:
    """Rows of a table: prompts to learn from, the population of all others, and draws from it with replacement.

    Attributes:
        held: which of the prompts to learn from make the threshold of the outlier test.
    """

    fit: Rows
    held: NDArray[np.bool_]
    population: Rows
    calibrate: Rows
    test: Rows

    @classmethod
    def of(cls, prompts: int, sizes: Mapping[str, int], seed: int, times: int = 1) -> list[Draw]:
        """So many draws of one part of some prompts to learn from, in the sizes of a run's splits."""
        random = np.random.default_rng(seed)
        fit, population = np.split(random.permutation(prompts), [sizes["train"] + sizes["tune"]])
        held, drawn = np.arange(len(fit)) < sizes["tune"], ("calibrate", "test")
        return [
            cls(fit, held, population, *(random.choice(population, sizes[name]) for name in drawn))
            for _ in range(times)
        ]


@dataclass(frozen=True, slots=True)
class Share:
    """A share of the draws and its exact binomial interval (95%). The draws are of one pool, so the interval is of the
    drawing alone: other prompts can be further off."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Violations:
    """How often the certificate was broken, over draws from the pooled prompts.

    Attributes:
        repeats: draws.
        certified: share of them that found a price that shortens; the others ran the full plan and can break nothing.
        of_pool: share where the mean loss of *all* pooled prompts under the certified price exceeds alpha. The pool is
            the population here, which is what the certificate speaks of: this must not exceed delta.
        of_test: share where the mean loss of prompts drawn to test, as many as were not drawn to calibrate, exceeds
            alpha. These are a small sample themselves: with two equal samples and delta = 10% a certificate without
            slack is broken in up to 18% of the draws (1.28 / sqrt(2) standard deviations), and that is no fault.
        mean_budget: of the prompts drawn to test, in shares of the decoder.
        mean_risk: mean loss of the prompts drawn to test; for `mean_score`, like every mean loss here, in shares of the
            full model's mean score on the same prompts.
    """

    repeats: int
    certified: float
    of_pool: Share
    of_test: Share
    mean_budget: float
    mean_risk: float


def resampled_violations(
    predicted: NDArray[np.float32],
    losses: Floats,
    rule: ChoiceRule,
    alpha: float,
    delta: float,
    n_calibrate: int,
    repeats: int = 500,
    seed: int = 0,
    *,
    full: Floats | None = None,
) -> Violations:
    """Calibrates on prompts drawn with replacement, `repeats` times, and counts how often `alpha` is exceeded.

    Args:
        predicted: losses that a controller which saw none of these prompts expects [N, K].
        losses: what each plan really loses on each prompt [N, K].
        rule: chooses plans, for the risk that is bounded.
        alpha, delta, full: as in `controller.certificate.calibration.valid_price`.
        n_calibrate: prompts to calibrate on; N - n_calibrate are drawn to test.
        repeats: number of draws.
        seed: another seed draws others.

    Raises:
        CalibrationError: no prompts to calibrate on or none to test on, or losses that cannot be.
    """
    at_prices, run = _outcomes(predicted, losses, rule)
    return redrawn(at_prices, run, alpha, delta, n_calibrate, repeats, seed, risk=rule.risk, full=full)


def redrawn(
    at_steps: Floats,
    run: Floats,
    alpha: float,
    delta: float,
    n_calibrate: int,
    repeats: int = 500,
    seed: int = 0,
    *,
    risk: Risk = "insufficient",
    full: Floats | None = None,
) -> Violations:
    """The same for any steps that are tested one after the other, such as prices or thresholds.

    Args:
        at_steps: loss of each prompt at each step, safest first, and in the last row without any [T + 1, N].
        run: share of the decoder that each prompt runs there [T + 1, N].
        alpha, delta, n_calibrate, repeats, seed, risk, full: as in `resampled_violations`.

    Raises:
        CalibrationError: no prompts to calibrate on or none to test on, or losses that cannot be.
    """
    n_prompts = at_steps.shape[1]
    if not 0 < n_calibrate < n_prompts:
        raise CalibrationError(
            f"{n_calibrate} of {n_prompts} prompts to calibrate on: there must be some on both sides"
        )
    draws, means = np.random.default_rng(seed), []
    scores = np.ones(n_prompts) if full is None else full
    for _ in range(repeats):
        # choices do not depend on the draw, so a draw only picks columns
        seen, test = np.split(draws.integers(0, n_prompts, n_prompts), [n_calibrate])
        index = last_valid(price_p_values(at_steps[:-1, seen], alpha, delta, risk, full=scores[seen]), delta)
        row = len(at_steps) - 1 if index is None or (run[index, seen] == run[-1, seen]).all() else index
        of_all = at_steps[row].mean() / loss_scale(risk, scores)
        of_test = at_steps[row, test].mean() / loss_scale(risk, scores[test])
        means.append((row < len(at_steps) - 1, of_all, of_test, run[row, test].mean()))
    certified, of_pool, of_test, budget = np.array(means).T
    return Violations(
        repeats=repeats,
        certified=float(certified.mean()),
        of_pool=_share(of_pool > alpha),
        of_test=_share(of_test > alpha),
        mean_budget=float(budget.mean()),
        mean_risk=float(of_test.mean()),
    )


def _outcomes(predicted: NDArray[np.float32], losses: Floats, rule: ChoiceRule) -> tuple[Floats, Floats]:
    """Loss and budget of each prompt at each price and, in the last row, under the full plan: [T + 1, N] each."""
    chosen = choices(predicted, rule)
    chosen = np.concatenate([chosen, np.full((1, len(losses)), losses.shape[1] - 1)])
    return np.asarray(losses, dtype=np.float64)[np.arange(len(losses)), chosen], rule.budgets[chosen]


def _share(violated: NDArray[np.bool_]) -> Share:
    from scipy.stats import binomtest

    interval = binomtest(int(violated.sum()), len(violated)).proportion_ci(0.95, method="exact")
    return Share(float(violated.mean()), float(interval.low), float(interval.high))
