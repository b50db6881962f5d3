"""Report cards of policies, price curves, and the regret of controllers.

Shapes: `N` prompts, `K` plans, cheapest first, the last full. `predicted` and `losses` [N, K] are those of
`controller.certificate.risks.plan_losses`, expected and true.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from controller.base import ChoiceRule
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
    chosen: Choices, scores: Floats, losses: Floats, budgets: Floats, layers: Sequence[float], scale: float = 1.0
) -> ReportCard:
    """The card of a policy that runs plan `chosen[i]` [N] for prompt i.

    Several draws of a random policy can be given as one array [R * N] with `scores` and `losses` repeated R times.

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
        loss=float(losses[rows, chosen].mean()) / scale,
        captured_headroom=None if np.isnan(captured) else captured,
        plan_shares=(np.bincount(chosen, minlength=len(budgets)) / len(chosen)).tolist(),
        worse=float((changed < 0).mean()),
        better=float((changed > 0).mean()),
        score_lost=float(np.maximum(-changed, 0).mean()) / max(full_score, 1e-12),
        score_won=float(np.maximum(changed, 0).mean()) / max(full_score, 1e-12),
    )


def price_curve(predicted: Predicted, scores: Floats, rule: ChoiceRule) -> list[tuple[float, float]]:
    """(mean budget, mean score) at every price, safest first."""
    rows = np.arange(len(scores))
    return [
        (float(rule.budgets[chosen].mean()), float(scores[rows, chosen].mean())) for chosen in choices(predicted, rule)
    ]


def price_for_loss(predicted: Predicted, losses: Floats, rule: ChoiceRule, bound: float) -> float | None:
    """The lowest price with a mean loss of at most `bound` on these prompts, or None.

    This is no guarantee for other prompts: see `controller.certificate.calibration`.
    """
    means = losses[np.arange(len(losses)), choices(predicted, rule)].mean(axis=1)
    start, after = _run_within(bound, means)
    return float(PRICES[after - 1]) if after > start else None


def _run_within(bound: float, losses: Floats) -> tuple[int, int]:
    """Start and end of the run of mean losses of at most `bound`.

    The full model loses nothing, so a bound above 0 starts with the first; else with the least loss.
    """
    start = 0 if bound > 0 else int(losses.argmin())
    beyond = np.flatnonzero(losses[start:] > bound)
    return start, start + int(beyond[0]) if len(beyond) else len(losses)


def regret(predicted: Predicted, losses: Floats, rule: ChoiceRule, bounds: Sequence[float]) -> float:
    """Mean budget beyond the oracle's at equal mean loss, over some bounds.

    The budget at a bound lies on the line between the last price that keeps within it and the first that does not.
    """
    curve = np.array([(1.0, 0.0), *price_curve(predicted, -losses, rule)])
    spent, lost = np.minimum.accumulate(curve[:, 0]), -curve[:, 1]
    oracle = path(sweep(-losses, rule.budgets), -losses, rule.budgets)
    least = np.interp(-np.asarray(bounds), oracle[:, 1], oracle[:, 0])
    return float(np.mean([_spent_at(bound, lost, spent) for bound in bounds] - least))


def _spent_at(bound: float, losses: Floats, spent: Floats) -> float:
    """Budget where the mean loss reaches `bound`; 1 where no point is within."""
    start, after = _run_within(bound, losses)
    if after == start:
        return 1.0
    if after == len(losses):
        return float(spent[-1])
    return float(np.interp(bound, losses[after - 1 : after + 1], spent[after - 1 : after + 1]))
