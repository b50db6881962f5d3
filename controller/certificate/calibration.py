"""Certified prices: Learn-then-Test on the calibrate split.

Source: Angelopoulos et al. 2021, Learn then Test (arXiv 2110.01052), section 2; fixed-sequence testing as in CALM
(Schuster et al. 2022, arXiv 2207.07061, section 4). The test is MAPIE's.

Shapes: `T` prices, `n` calibration prompts, `K` plans.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
from numpy.typing import NDArray

from controller.base import ChoiceRule
from controller.certificate.certificate import Certificate, alpha_of
from controller.certificate.p_values import fewest_prompts, p_values
from controller.certificate.risks import CalibrationError, Floats, Names, Risk, group_means, loss_scale

PRICES: Floats = np.geomspace(1000.0, 0.01, 577)
"""Prices of an expected loss of 1, in shares of the decoder, highest first [T]. Fixed before any data is seen, as the
test requires. In a fixed sequence more steps cost no confidence; with steps of 8% instead of 2% one step could change
half of the choices where prompts are alike."""

CHUNK = 4_000_000
"""Numbers in memory at once while plans are chosen at all prices."""


@dataclass(frozen=True, slots=True)
class PricePath:
    """What each price does to n calibration prompts, safest first.

    Attributes:
        losses: of each prompt under the plan that each price chooses for it [T, n].
        shortens: whether each price chooses a shortened plan for any prompt [T].
    """

    losses: Floats
    shortens: NDArray[np.bool_]

    @classmethod
    def of(
        cls,
        predicted: NDArray[np.float32],
        losses: Floats,
        rule: ChoiceRule,
        labelled: NDArray[np.bool_] | None = None,
    ) -> PricePath:
        """The path of n prompts under K plans.

        Args:
            predicted: expected losses [n, K].
            losses: true losses [n, K].
            rule: for the K plans.
            labelled: which losses are known [n, K]; None for all. See `on_path`.

        Raises:
            CalibrationError: a price chooses a plan whose loss is not known.
        """
        chosen, rows = choices(predicted, rule), np.arange(len(losses))
        if labelled is not None and (unknown := int((~labelled[rows, chosen]).any(axis=0).sum())):
            raise CalibrationError(
                f"{unknown} of {len(rows)} prompts lack labels of plans that a price chooses; label what on_path names"
            )
        return cls(losses[rows, chosen], np.asarray((chosen < losses.shape[1] - 1).any(axis=1)))


def choices(predicted: NDArray[np.float32], rule: ChoiceRule) -> NDArray[np.intp]:
    """Plans that each price chooses for n prompts [T, n], from expected losses [n, K]."""
    parts = np.array_split(PRICES, 1 + PRICES.size * predicted.size // CHUNK)
    return np.concatenate([rule.choose_each(predicted, prices) for prices in parts])


def on_path(predicted: NDArray[np.float32], rule: ChoiceRule) -> NDArray[np.bool_]:
    """Labels that a test needs [n, K]: plans that some price chooses, and the full plan.

    It depends on expected losses [n, K] and the rule alone, so a test on these labels is the test on all.
    """
    found = np.zeros(predicted.shape, dtype=np.bool_)
    found[np.arange(len(predicted)), choices(predicted, rule)] = True
    found[:, -1] = True
    return found


def first_price(path: PricePath, alpha: float, full: Floats) -> int:
    """Place of the first price to test, from prompts that are not tested.

    The highest price runs the full model, which meets every bound below its own score. For other bounds the sequence
    begins at the largest mean margin in standard deviations.

    Args:
        path: of n prompts, decided by a controller that did not see them.
        alpha: the bound, see `p_values`.
        full: the full model's score of each prompt [n].
    """
    if alpha > 0:
        return 0
    margins = alpha * full - path.losses
    return int((margins.mean(axis=1) / (margins.std(axis=1) + 1e-9)).argmax())


def valid_price(
    path: PricePath,
    alpha: float,
    delta: float,
    tasks: Names | None = None,
    *,
    risk: Risk = "insufficient",
    full: Floats | None = None,
    groups: Names | None = None,
    start: int = 0,
) -> float | None:
    """The lowest price whose mean loss is at most `alpha` with probability 1 - `delta`.

    None where there is none, and where that price shortens nothing: then the full plan is as good, without a probe.

    Args:
        path: what each price does to the calibration prompts.
        alpha: bound on the mean loss; with `tasks`, on the mean loss of each task.
        delta: how often the bound may fail, over draws of the prompts: family-wise, over all prices (and tasks).
        tasks: task of each prompt [n], for a bound in every task; None for the mean over all prompts.
        risk: which loss it is.
        full: the full model's score of each prompt [n], for `mean_score`.
        groups: group of each prompt [n], see `group_means`; None where prompts are independent draws.
        start: place of the price that is tested first, see `first_price`.

    Raises:
        CalibrationError: a bound or losses that cannot be; not one task or group a prompt.
    """
    index = last_valid(price_p_values(path.losses[start:], alpha, delta, risk, tasks, full, groups), delta)
    return None if index is None or not path.shortens[start + index] else float(PRICES[start + index])


def price_p_values(
    losses: Floats,
    alpha: float,
    delta: float,
    risk: Risk,
    tasks: Names | None = None,
    full: Floats | None = None,
    groups: Names | None = None,
) -> Floats:
    """P-values [T] of "the mean loss exceeds alpha", from losses [T, n].

    With `tasks` they are of "in some task it does": the largest of the tasks' p-values, an intersection-union test
    (Berger 1982, Technometrics 24(4), theorem 1). One price for all tasks needs no correction, but must suit the
    hardest task. A price per task (Mondrian) would have to hold at delta / tasks.
    """
    if tasks is not None and len(tasks) != losses.shape[1]:
        raise CalibrationError(f"{len(tasks)} task names were given for {losses.shape[1]} prompts; give one a prompt")
    losses, risk, tasks, full = group_means(losses, risk, groups, tasks, full)
    if tasks is None or not len(tasks):
        return p_values(losses, alpha, delta, risk, full)
    each = [
        p_values(losses[:, rows], alpha, delta, risk, None if full is None else full[rows])
        for rows in (np.asarray(tasks) == name for name in np.unique(tasks))
    ]
    return np.asarray(np.max(each, axis=0))


def last_valid(values: Floats, delta: float) -> int | None:
    """Place before the first p-value [T] above delta; None where that is the first."""
    from mapie.risk_control import FWERFixedSequenceTesting, control_fwer

    valid = control_fwer(values, delta, FWERFixedSequenceTesting(n_starts=1))
    return int(valid[-1]) if len(valid) else None


def cheapest_valid_plan(
    losses: Floats,
    alpha: float,
    delta: float,
    risk: Risk,
    *,
    expected: Floats,
    tasks: Names | None = None,
    full: Floats | None = None,
    groups: Names | None = None,
) -> int:
    """The cheapest plan whose mean loss is at most `alpha` with probability 1 - `delta`.

    Plans are tested in the order of `expected` until the first that fails (a fixed sequence), so delta covers the
    choice among them. The largest plan is not always the safest: a gap can lose more than an exit before it.

    Args:
        losses: of n prompts under K plans [n, K], cheapest first, the last full.
        risk: which loss it is.
        expected: mean loss of each plan [K] on other prompts.
        tasks, full, groups: see `valid_price`.

    Returns:
        The plan's place; K - 1, the full plan, where no other is valid.
    """
    order = np.argsort(expected[:-1], kind="stable")
    if not len(order):
        return 0
    index = last_valid(price_p_values(losses.T[order], alpha, delta, risk, tasks, full, groups), delta)
    return len(order) if index is None else int(order[: index + 1].min())


def certify(
    path: PricePath,
    *,
    keep: float,
    delta: float,
    risk: Risk,
    tasks: Names,
    full: Floats | None = None,
    groups: Names | None = None,
    start: int = 0,
    levels: tuple[float, ...] = (),
    share: float = 1.0,
    per_task: bool = False,
    tolerance: float = 0.0,
    left_out: int = 0,
    prompts_hash: str = "",
    decoding: str = "",
    chat_template: str = "",
) -> Certificate:
    """Find the lowest valid price and make its certificate.

    Args:
        path, risk, full, groups, start: as in `valid_price`.
        keep: 1 - alpha there.
        delta: how often any of the `levels` may fail.
        tasks: task of each calibration prompt [n].
        levels: all values of `keep` certified on these prompts. They share delta in equal parts (Bonferroni), so any of
            them can be chosen afterwards; empty for this one alone.
        share: of delta that these prices have, where something else is tested too.
        per_task: whether the bound is to hold in every task.
        tolerance, left_out, prompts_hash, decoding, chat_template: see `Certificate`.
    """
    alpha, delta_each = alpha_of(keep), share * delta / max(len(levels), 1)
    tested_tasks = tasks if per_task else None
    price = valid_price(path, alpha, delta_each, tested_tasks, risk=risk, full=full, groups=groups, start=start)
    ones = np.ones(len(tasks))
    losses, tested, names, scores = group_means(path.losses, risk, groups, tested_tasks, ones if full is None else full)
    assert scores is not None
    at_price = np.zeros(len(scores)) if price is None else losses[int(np.flatnonzero(price == PRICES)[0])]
    needed = None
    if price is None and not path.shortens[start:].any():
        needed = 0
    elif price is None:
        first = losses[start + int(path.shortens[start:].argmax())]
        needed = _prompts_needed(first, alpha, delta_each, tested, names, scores)
    return Certificate(
        risk=risk,
        keep=keep,
        delta=delta,
        n=len(tasks),
        price=price,
        observed_risk=float(at_price.mean()) / loss_scale(risk, scores),
        prompts_hash=prompts_hash,
        date=datetime.now(UTC).date().isoformat(),
        fewest_prompts=_fewest_prompts(alpha, delta_each, tested, names, scores) if alpha > 0 else None,
        full_score=float(scores.mean()),
        prompts_needed=needed,
        per_task={} if names is None else _per_task(risk, at_price, scores, np.asarray(names)),
        tolerance=tolerance,
        decoding=decoding,
        chat_template=chat_template,
        left_out=left_out,
        levels=levels if len(levels) > 1 else (),
        groups=None if len(scores) == len(tasks) else len(scores),
    )


def _fewest_prompts(alpha: float, delta: float, risk: Risk, tasks: Names | None, full: Floats) -> int | None:
    """`fewest_prompts` of the task that needs the most; None where no number suffices."""
    names = np.zeros(len(full)) if tasks is None else np.asarray(tasks)
    means = {float(full[names == name].mean()) for name in np.unique(names)}
    try:
        return max(fewest_prompts(alpha, delta, risk, 0.0, round(mean, 4)) for mean in means)
    except CalibrationError:
        return None


def _prompts_needed(
    losses: Floats, alpha: float, delta: float, risk: Risk, tasks: Names | None, full: Floats
) -> int | None:
    """Number of prompts that would suffice if they lost like these [n]: a larger sample of the same quantiles."""
    names = np.zeros(len(full)) if tasks is None else np.asarray(tasks)
    order = np.lexsort((full, losses, names))
    for times in (1.25, 1.5, 1.75, 2, 2.5, 3, 4, 6, 8, 12, 16, 24, 32):
        count = round(times * len(full))
        rows = order[np.linspace(0, len(full) - 1, count).round().astype(int)]
        tested = None if tasks is None else names[rows]
        if price_p_values(losses[rows][None], alpha, delta, risk, tested, full[rows])[0] <= delta:
            return count
    return None


def _per_task(risk: Risk, losses: Floats, full: Floats, names: NDArray[np.str_]) -> dict[str, dict[str, float]]:
    tasks = {str(name): names == name for name in np.unique(names)}
    return {
        name: {"n": int(rows.sum()), "observed_risk": float(losses[rows].mean()) / loss_scale(risk, full[rows])}
        for name, rows in tasks.items()
    }
