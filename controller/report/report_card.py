"""How good a policy is: quality, budget, loss, and the share of the headroom it captures.

Shapes: `N` prompts, `K` plans, cheapest first, the last full. `predicted` and `kept` are shares of quality [N, K],
expected by a controller and true; a loss is 1 - kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from controller.base import choose
from controller.certificate.calibration import PRICES
from oracle.frontier.frontier import captured_headroom
from oracle.frontier.upgrades import climb, path

Floats = NDArray[np.float64]
Predicted = NDArray[np.float32]
Choices = NDArray[np.intp]


@dataclass(frozen=True, slots=True)
class ReportCard:
    """One policy on N prompts.

    Attributes:
        quality: mean score.
        quality_ratio: to the full model's.
        budget: mean share of the decoder that ran.
        layers: mean number of layers that ran.
        loss: mean loss, of the kind that the certificate bounds.
        captured_headroom: see `oracle.frontier.frontier.captured_headroom`; None where it is not defined.
        plan_shares: share of the prompts that ran each plan [K].
    """

    quality: float
    quality_ratio: float
    budget: float
    layers: float
    loss: float
    captured_headroom: float | None
    plan_shares: list[float]


def report_card(chosen: Choices, scores: Floats, kept: Floats, budgets: Floats, layers: Sequence[float]) -> ReportCard:
    """The card of a policy that runs plan `chosen[i]` [N] for prompt i.

    Several draws of a random policy can be given as one array [R * N] with `scores` and `kept` repeated R times.
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
        loss=1.0 - float(kept[rows, chosen].mean()),
        captured_headroom=None if np.isnan(captured) else captured,
        plan_shares=(np.bincount(chosen, minlength=len(budgets)) / len(chosen)).tolist(),
    )


def losses_at(predicted: Predicted, kept: Floats, budgets: Floats, price: float) -> Floats:
    """[N]: the loss of each prompt under the plan chosen at `price`."""
    chosen = choose(predicted, budgets, price)
    losses: Floats = 1.0 - kept[np.arange(len(chosen)), chosen]
    return losses


def price_curve(predicted: Predicted, scores: Floats, budgets: Floats) -> list[tuple[float, float]]:
    """(mean budget, mean score) at every price, safest first."""
    rows, points = np.arange(len(scores)), []
    for price in PRICES:
        chosen = choose(predicted, budgets, float(price))
        points.append((float(budgets[chosen].mean()), float(scores[rows, chosen].mean())))
    return points


def price_for_loss(predicted: Predicted, kept: Floats, budgets: Floats, bound: float) -> float:
    """The lowest price whose mean loss on these prompts, and that of every safer one, is at most `bound`; inf if none.

    What the prompts show, with no guarantee for others: see `controller.certificate.calibration` for that.
    """
    found = float("inf")
    for price in PRICES:
        if losses_at(predicted, kept, budgets, float(price)).mean() > bound:
            break
        found = float(price)
    return found


def regret(predicted: Predicted, kept: Floats, budgets: Floats, bounds: Sequence[float]) -> float:
    """How much more of the decoder a controller spends than the oracle at equal mean loss, averaged over some bounds.

    The budget at a bound lies on the line between the last price that keeps within it and the first that does not.
    """
    curve = np.array([(1.0, 1.0), *price_curve(predicted, kept, budgets)])
    spent = np.minimum.accumulate(curve[:, 0])
    lost = np.maximum.accumulate(1 - curve[:, 1])
    oracle = path(climb(kept, budgets), kept, budgets)
    excess = [np.interp(bound, lost, spent) - np.interp(1 - bound, oracle[:, 1], oracle[:, 0]) for bound in bounds]
    return float(np.mean(excess))
