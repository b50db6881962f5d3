"""Does the certificate hold? Calibrate anew on many random halves of the labelled prompts, and look at the rest.

Shapes: `N` pooled prompts, `K` plans, `T` prices.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from controller.certificate.calibration import choices, last_valid, price_p_values
from controller.certificate.p_values import CalibrationError
from controller.certificate.risks import Risk, unit_of

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Share:
    """A share of the splits and its exact binomial interval (95%), as if the splits were independent. They share their
    prompts, so the interval is of the splitting alone: other prompts can be further off."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Violations:
    """How often the certificate was broken, over random splits of the pooled prompts.

    Attributes:
        repeats: splits.
        certified: share of them that found a price that shortens; the others ran the full plan and can break nothing.
        of_pool: share where the mean loss of *all* pooled prompts under the certified price exceeds alpha. The pool
            plays the population from which the calibration prompts are drawn, which is what the certificate speaks of:
            this must not exceed delta. (Drawn without replacement, so it is exceeded a little less often than in
            truth.)
        of_rest: share where the mean loss of the prompts left out exceeds alpha. These are a small sample themselves,
            and what was lucky in one half is missing from the other: with two equal halves and delta = 10% a
            certificate without slack is broken in up to 18% of the splits (1.28 / sqrt(2) standard deviations), and
            that is no fault.
        mean_budget: of the prompts left out, in shares of the decoder.
        mean_risk: mean loss of the prompts left out; for `mean_score`, like every mean loss here, in shares of the full
            model's mean score on the same prompts.
    """

    repeats: int
    certified: float
    of_pool: Share
    of_rest: Share
    mean_budget: float
    mean_risk: float


def resampled_violations(
    kept_predictions: NDArray[np.float32],
    losses: Floats,
    budgets: Floats,
    alpha: float,
    delta: float,
    n_calibrate: int,
    repeats: int = 500,
    seed: int = 0,
    *,
    risk: Risk = "insufficient",
    full: Floats | None = None,
) -> Violations:
    """Calibrates on `n_calibrate` random prompts, `repeats` times, and counts how often `alpha` is exceeded.

    Args:
        kept_predictions: what a controller that saw none of these prompts expects to be kept [N, K].
        losses: what each plan really loses on each prompt [N, K].
        budgets: share of the decoder that each plan runs [K], ascending.
        alpha, delta, risk, full: as in `controller.certificate.calibration.valid_price`.
        n_calibrate: prompts to calibrate on; the other N - n_calibrate are the test.
        repeats: number of splits.
        seed: another seed splits otherwise.

    Raises:
        CalibrationError: a split that leaves no prompts on one side, or losses that cannot be.
    """
    at_prices, run = _outcomes(kept_predictions, losses, budgets)
    return redrawn(at_prices, run, alpha, delta, n_calibrate, repeats, seed, risk=risk, full=full)


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
        CalibrationError: a split that leaves no prompts on one side, or losses that cannot be.
    """
    n_prompts = at_steps.shape[1]
    if not 0 < n_calibrate < n_prompts:
        raise CalibrationError(
            f"{n_calibrate} of {n_prompts} prompts to calibrate on: there must be some on both sides"
        )
    draws, means = np.random.default_rng(seed), []
    scores = np.ones(n_prompts) if full is None else full
    for _ in range(repeats):
        order = draws.permutation(n_prompts)
        # choices do not depend on the split, so a split only picks columns
        seen, rest = order[:n_calibrate], order[n_calibrate:]
        index = last_valid(price_p_values(at_steps[:-1, seen], alpha, delta, risk, full=scores[seen]), delta)
        row = len(at_steps) - 1 if index is None or (run[index, seen] == run[-1, seen]).all() else index
        of_all = at_steps[row].mean() / unit_of(risk, scores)
        of_rest = at_steps[row, rest].mean() / unit_of(risk, scores[rest])
        means.append((row < len(at_steps) - 1, of_all, of_rest, run[row, rest].mean()))
    certified, of_pool, of_rest, budget = np.array(means).T
    return Violations(
        repeats=repeats,
        certified=float(certified.mean()),
        of_pool=_share(of_pool > alpha),
        of_rest=_share(of_rest > alpha),
        mean_budget=float(budget.mean()),
        mean_risk=float(of_rest.mean()),
    )


def _outcomes(kept: NDArray[np.float32], losses: Floats, budgets: Floats) -> tuple[Floats, Floats]:
    """Loss and budget of each prompt at each price and, in the last row, under the full plan: [T + 1, N] each."""
    chosen = choices(kept, budgets)
    chosen = np.concatenate([chosen, np.full((1, len(losses)), len(budgets) - 1)])
    return np.asarray(losses, dtype=np.float64)[np.arange(len(losses)), chosen], np.asarray(budgets)[chosen]


def _share(violated: NDArray[np.bool_]) -> Share:
    from scipy.stats import binomtest

    interval = binomtest(int(violated.sum()), len(violated)).proportion_ci(0.95, method="exact")
    return Share(float(violated.mean()), float(interval.low), float(interval.high))
