"""How good a policy is: quality, budget, loss, and the share of the headroom it captures.

Shapes: `N` prompts, `K` plans, cheapest first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from controller.base import choose
from controller.calibration import THRESHOLDS
from oracle.frontier import captured_headroom

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Choices = NDArray[np.intp]


@dataclass(frozen=True, slots=True)
class ReportCard:
    """One policy on N prompts.

    Attributes:
        quality: mean score.
        quality_ratio: to the full model's.
        budget: mean share of the decoder that ran.
        layers: mean number of layers that ran.
        loss: share of prompts whose answer scored lower than the full model's (less the tolerance).
        captured_headroom: see `oracle.frontier.captured_headroom`; None where it is not defined.
        plan_shares: share of the prompts that ran each plan [K].
    """

    quality: float
    quality_ratio: float
    budget: float
    layers: float
    loss: float
    captured_headroom: float | None
    plan_shares: list[float]


def report_card(
    chosen: Choices, scores: Floats, sufficient: Bools, budgets: Floats, layers: Sequence[float]
) -> ReportCard:
    """The card of a policy that runs plan `chosen[i]` [N] for prompt i.

    Several draws of a random policy can be given as one array [R * N] with `scores` and `sufficient` repeated R times.
    """
    rows = np.arange(len(chosen))
    quality, full_quality = float(scores[rows, chosen].mean()), float(scores[:, -1].mean())
    budget = float(budgets[chosen].mean())
    captured = captured_headroom(quality, budget, scores, budgets)
    return ReportCard(
        quality=quality,
        quality_ratio=quality / full_quality if full_quality else float("nan"),
        budget=budget,
        layers=float(np.asarray(layers)[chosen].mean()),
        loss=1.0 - float(sufficient[rows, chosen].mean()),
        captured_headroom=None if np.isnan(captured) else captured,
        plan_shares=(np.bincount(chosen, minlength=len(budgets)) / len(chosen)).tolist(),
    )


def threshold_losses(probabilities: NDArray[np.float32], sufficient: Bools, threshold: float) -> Floats:
    """[N]: 1 where the plan chosen at `threshold` is not sufficient, else 0."""
    chosen = choose(probabilities, threshold)
    return 1.0 - sufficient[np.arange(len(chosen)), chosen].astype(np.float64)


def threshold_curve(
    probabilities: NDArray[np.float32], sufficient: Bools, scores: Floats, budgets: Floats
) -> list[tuple[float, float, float]]:
    """(mean budget, mean score, loss) at every threshold, safest first."""
    rows, points = np.arange(len(scores)), []
    for threshold in THRESHOLDS:
        chosen = choose(probabilities, float(threshold))
        loss = 1.0 - sufficient[rows, chosen].mean()
        points.append((float(budgets[chosen].mean()), float(scores[rows, chosen].mean()), float(loss)))
    return points


def budget_at_losses(
    probabilities: NDArray[np.float32], sufficient: Bools, budgets: Floats, losses: Sequence[float]
) -> float:
    """Mean, over some bounds on the loss, of the least mean budget at which a threshold keeps within the bound."""
    points = threshold_curve(probabilities, sufficient, sufficient.astype(np.float64), budgets)
    least = [min([budget for budget, _, loss in points if loss <= bound] + [1.0]) for bound in losses]
    return float(np.mean(least))
