"""A price with a guarantee: Learn-then-Test on the calibrate split, over the prices of one unit of expected loss.

Source: Angelopoulos et al. 2021, Learn then Test (arXiv 2110.01052), section 2; fixed-sequence testing as in CALM
(Schuster et al. 2022, arXiv 2207.07061, section 4). The test is MAPIE's.

Shapes: `T` prices, `n` calibration prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime

import numpy as np
from numpy.typing import NDArray

from controller.certificate.certificate import Certificate
from controller.certificate.fewest_prompts import fewest_prompts
from controller.certificate.p_values import CalibrationError, p_values
from controller.certificate.risks import Risk, unit_of

Floats = NDArray[np.float64]
Groups = Sequence[str] | NDArray[np.str_]

PRICES: Floats = np.geomspace(1000.0, 0.01, 577)
"""What an expected loss of 1 may cost, in shares of the decoder, safest first [T]. Fixed before any data is
seen, as the test requires; that the risk grows along them is likely, and helps, but the guarantee does not need it. In
a fixed sequence more steps cost no confidence; with steps of 8% instead of 2% one step could change half of the choices
where prompts are alike."""


def valid_price(
    losses: Callable[[float], Floats],
    alpha: float,
    delta: float,
    groups: Groups | None = None,
    *,
    risk: Risk = "insufficient",
    full: Floats | None = None,
) -> float | None:
    """The lowest price whose mean loss is at most `alpha` with probability 1 - `delta`, or None.

    Args:
        losses: price -> loss [n] of each calibration prompt under the plans that this price chooses.
        alpha: bound on the mean loss; with `groups`, on the mean loss of each task.
        delta: how often the bound may fail, over draws of the prompts: family-wise, over all prices (and tasks).
        groups: task of each prompt [n], for a bound that holds in every task; None for the mean over all prompts.
        risk: which loss it is.
        full: the full model's score of each prompt [n], for `mean_score`.

    Raises:
        CalibrationError: a bound or losses that cannot be; as many groups as there are not prompts.
    """
    samples = np.stack([np.asarray(losses(float(price)), dtype=np.float64) for price in PRICES])
    index = last_valid(price_p_values(samples, alpha, delta, risk, groups, full), delta)
    return None if index is None else float(PRICES[index])


def price_p_values(
    losses: Floats,
    alpha: float,
    delta: float,
    risk: Risk,
    groups: Groups | None = None,
    full: Floats | None = None,
) -> Floats:
    """P-values [T] of "the mean loss exceeds alpha", or with `groups` of "in some task it does", from losses [T, n].

    The second is the largest of the tasks' p-values, an intersection-union test (Berger 1982, Technometrics 24(4),
    theorem 1). To be wrong it must be wrong about the one task whose mean does exceed alpha, and that happens with
    probability delta however many tasks there are: so one price for all tasks costs no correction, but must suit the
    hardest task. A price per task (Mondrian) makes one claim a task, any of which may be the wrong one: each would have
    to hold at delta / tasks.
    """
    if groups is None:
        return p_values(losses, alpha, delta, risk, full)
    names = np.asarray(groups)
    if names.shape != losses.shape[1:]:
        raise CalibrationError(f"{len(names)} task names were given for {losses.shape[1]} prompts; give one a prompt")
    of_tasks = [
        p_values(losses[:, rows], alpha, delta, risk, None if full is None else full[rows])
        for rows in (names == name for name in np.unique(names))
    ]
    return np.asarray(np.max(of_tasks, axis=0)) if of_tasks else p_values(losses, alpha, delta, risk, full)


def last_valid(values: Floats, delta: float) -> int | None:
    """The last price before the first whose p-value [T] exceeds delta, or None where the first does."""
    from mapie.risk_control import FWERFixedSequenceTesting, control_fwer

    valid = control_fwer(values, delta, FWERFixedSequenceTesting(n_starts=1))
    return int(valid[-1]) if len(valid) else None


def cheapest_valid_plan(
    losses: Floats,
    alpha: float,
    delta: float,
    risk: Risk,
    groups: Groups | None = None,
    scores: Floats | None = None,
) -> int:
    """The cheapest plan that, run by all prompts, loses at most `alpha` on average with probability 1 - `delta`.

    Plans are tested from the largest down until the first that fails (a fixed sequence), so that the choice among them
    is covered: to pick the best of K tests at `delta` each would be wrong up to K times as often.

    Args:
        risk: what the losses are; see `controller.certificate.risks`.
        losses: of n prompts under K plans [n, K], cheapest first, the last full.
        groups: see `valid_price`.
        scores: the full model's [n], for `mean_score`.

    Returns:
        The plan's place; K - 1, the full plan, where no other is valid.
    """
    full = int(losses.shape[1]) - 1
    tested = losses[:, :full][:, ::-1].T
    index = last_valid(price_p_values(tested, alpha, delta, risk, groups, scores), delta) if full else None
    return full if index is None else full - 1 - index


def certify(
    losses: Callable[[float], Floats],
    *,
    alpha: float,
    delta: float,
    risk: Risk,
    tasks: Groups,
    full: Floats | None = None,
    per_task: bool = False,
    tolerance: float = 0.0,
    prompts_hash: str = "",
    decoding: str = "",
    chat_template: str = "",
) -> Certificate:
    """Finds the price and says what it is worth.

    Args:
        losses, alpha, delta, risk, full: as in `valid_price`.
        tasks: task of each calibration prompt [n].
        per_task: whether the bound is to hold in every task.
        tolerance: how much lower than the full model's the score of a sufficient answer may be.
        prompts_hash: of the calibration prompts.
        decoding: how the answers were generated, in words.
        chat_template: hash of the template that the prompts were put into, if any.
    """
    names = np.asarray(tasks)
    groups = names if per_task else None
    price = valid_price(losses, alpha, delta, groups, risk=risk, full=full)
    observed = np.zeros(len(names)) if price is None else losses(price)  # without a price all run the full plan
    scores = np.ones(len(names)) if full is None else full
    return Certificate(
        risk=risk,
        alpha=alpha,
        delta=delta,
        n=len(names),
        price=price,
        observed_risk=float(observed.mean()) / unit_of(risk, scores),
        prompts_hash=prompts_hash,
        date=datetime.now(UTC).date().isoformat(),
        fewest_prompts=_fewest(alpha, delta, risk, scores, groups),
        full_score=float(scores.mean()),
        prompts_needed=None if price is not None else _needed(losses, alpha, delta, risk, scores, groups),
        per_task=_per_task(risk, observed, scores, names) if per_task else {},
        tolerance=tolerance,
        decoding=decoding,
        chat_template=chat_template,
    )


def _fewest(alpha: float, delta: float, risk: Risk, full: Floats, groups: Groups | None) -> int | None:
    """See `fewest_prompts`: of the task that needs the most, at the full model's mean score there; None where no number
    that can be looked at suffices."""
    names = np.zeros(len(full)) if groups is None else np.asarray(groups)
    means = {float(full[names == name].mean()) for name in np.unique(names)}
    try:
        return max(fewest_prompts(alpha, delta, risk, 0.0, round(mean, 4)) for mean in means)
    except CalibrationError:
        return None


def _needed(
    losses: Callable[[float], Floats], alpha: float, delta: float, risk: Risk, full: Floats, groups: Groups | None
) -> int | None:
    """About how many prompts that lose and vary like these [n] at the safest price would do: the test with each of them
    several times."""
    safest = losses(float(PRICES[0]))
    for times in (2, 3, 4, 6, 8, 12, 16, 24, 32):
        repeated = np.tile(safest, times)[None]
        tasks = None if groups is None else np.tile(np.asarray(groups), times)
        if price_p_values(repeated, alpha, delta, risk, tasks, np.tile(full, times))[0] <= delta:
            return times * len(safest)
    return None


def _per_task(risk: Risk, losses: Floats, full: Floats, names: NDArray[np.str_]) -> dict[str, dict[str, float]]:
    tasks = {str(name): names == name for name in np.unique(names)}
    return {
        name: {"n": int(rows.sum()), "observed_risk": float(losses[rows].mean()) / unit_of(risk, full[rows])}
        for name, rows in tasks.items()
    }
