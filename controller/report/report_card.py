"""Report cards of policies, price curves, and the regret of controllers.

Shapes: `N` prompts, `K` plans, cheapest first, the last full. `predicted` and `quality` [N, K] are quality of plans,
expected and true, on the scale of `controller.certificate.risks.plan_quality`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from controller.base import choose, plan_losses
from controller.certificate.calibration import PRICES, choices
from oracle.frontier.frontier import captured_headroom
from oracle.frontier.sweep import path, sweep

Floats = NDArray[np.float64]
Predicted = NDArray[np.float32]
Choices = NDArray[np.intp]


@dataclass(frozen=True, slots=True)
class ReportCard:
    """The figures of one policy on N prompts.

    Attributes:
        quality: mean score.
        quality_ratio: to the full model's.
        budget: mean share of the decoder that ran.
        layers: mean number of layers that ran.
        loss: mean loss of the certificate's risk, over `scale`.
        captured_headroom: see `oracle.frontier.frontier.captured_headroom`; None where it is not defined.
        plan_shares: share of the prompts that ran each plan [K].
        worse, better: share of the answers that score lower, and higher, than the full model's.
        score_lost, score_won: mean score that these lose and win, in shares of the full model's mean score.
    """

    quality: float
    quality_ratio: float
    budget: float
    layers: float
    loss: float
    captured_headroom: float | None
    plan_shares: list[float]
    worse: float
    better: float
    score_lost: float
    score_won: float


def report_card(
    chosen: Choices, scores: Floats, quality: Floats, budgets: Floats, layers: Sequence[float], scale: float = 1.0
) -> ReportCard:
    """The card of a policy that runs plan `chosen[i]` [N] for prompt i.

    Several draws of a random policy can be given as one array [R * N] with `scores` and `quality` repeated R times.

    Args:
        budgets, layers: of the plans [K].
        scale: of the loss, see `controller.certificate.risks.loss_scale`.
    """
    rows = np.arange(len(chosen))
    score, full_score = float(scores[rows, chosen].mean()), float(scores[:, -1].mean())
    budget = float(budgets[chosen].mean())
    captured = captured_headroom(score, budget, scores, budgets)
    changed = scores[rows, chosen] - scores[:, -1]
    return ReportCard(
        quality=score,
        quality_ratio=score / full_score if full_score else float("nan"),
        budget=budget,
        layers=float(np.asarray(layers)[chosen].mean()),
        loss=float(plan_losses(quality)[rows, chosen].mean()) / scale,
        captured_headroom=None if np.isnan(captured) else captured,
        plan_shares=(np.bincount(chosen, minlength=len(budgets)) / len(chosen)).tolist(),
        worse=float((changed < 0).mean()),
        better=float((changed > 0).mean()),
        score_lost=float(np.maximum(-changed, 0).mean()) / max(full_score, 1e-12),
        score_won=float(np.maximum(changed, 0).mean()) / max(full_score, 1e-12),
    )


def price_curve(predicted: Predicted, scores: Floats, budgets: Floats) -> list[tuple[float, float]]:
    """(mean budget, mean score) at every price, safest first."""
    rows, points = np.arange(len(scores)), []
    for price in PRICES:
        chosen = choose(predicted, budgets, float(price))
        points.append((float(budgets[chosen].mean()), float(scores[rows, chosen].mean())))
    return points


def price_for_loss(predicted: Predicted, quality: Floats, budgets: Floats, bound: float) -> float | None:
    """The lowest price with a mean loss of at most `bound` on these prompts, or None.

    This is no guarantee for other prompts: see `controller.certificate.calibration`.
    """
    losses = plan_losses(quality)[np.arange(len(quality)), choices(predicted, budgets)].mean(axis=1)
    start, after = _run_within(bound, losses)
    return float(PRICES[after - 1]) if after > start else None


def _run_within(bound: float, losses: Floats) -> tuple[int, int]:
    """Start and end of the run of mean losses of at most `bound`.

    The full model loses nothing, so a bound above 0 starts with the first; else with the least loss.
    """
    start = 0 if bound > 0 else int(losses.argmin())
    beyond = np.flatnonzero(losses[start:] > bound)
    return start, start + int(beyond[0]) if len(beyond) else len(losses)


def regret(predicted: Predicted, quality: Floats, budgets: Floats, bounds: Sequence[float]) -> float:
    """Mean budget beyond the oracle's at equal mean loss, over some bounds.

    The budget at a bound lies on the line between the last price that keeps within it and the first that does not.
    """
    retained = 1.0 - plan_losses(quality)  # 1 for the full plan
    curve = np.array([(1.0, 1.0), *price_curve(predicted, retained, budgets)])
    spent, losses = np.minimum.accumulate(curve[:, 0]), 1 - curve[:, 1]
    oracle = path(sweep(retained, budgets), retained, budgets)
    excess = [
        _spent_at(bound, losses, spent) - float(np.interp(1 - bound, oracle[:, 1], oracle[:, 0])) for bound in bounds
    ]
    return float(np.mean(excess))


def _spent_at(bound: float, losses: Floats, spent: Floats) -> float:
    """Budget where the mean loss reaches `bound`; 1 where no point is within."""
    start, after = _run_within(bound, losses)
    if after == start:
        return 1.0
    if after == len(losses):
        return float(spent[-1])
    return float(np.interp(bound, losses[after - 1 : after + 1], spent[after - 1 : after + 1]))
