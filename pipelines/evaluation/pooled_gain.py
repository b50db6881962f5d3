"""What the controller gains on prompts labelled in full, each decided out of fold: over mixtures and blind rivals.

A test split of some hundred prompts cannot tell the controller from the task's name. With the prompts to train and to
tune they are several times as many, and each is decided by a controller and at a price that did not see it.

Shapes: `N` prompts, `K` plans, `T` prices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from controller.base import Floats, choose
from controller.certificate.calibration import PRICES, PricePath, first_price
from controller.certificate.certificate import alpha_of
from controller.features import Features
from controller.learning import CrossFit, Settings
from controller.report.headroom import Curve, gains
from controller.report.report_card import price_for_loss
from pipelines.evaluation.learning_table import Table
from pipelines.evaluation.policies import Choices

FOLDS = 5
STEP = 8
"""Every so many of the prices are looked at; mixtures of them fill the gaps."""

MIXTURE = "static_mixture"
BLIND = ("shuffled", "task")
"""Controls that do not look at the prompt."""


def out_of_fold(settings: Settings, features: Features, table: Table) -> Floats:
    """What is expected of each prompt [N, K] by a controller that did not see it."""
    n_folds = min(FOLDS, len(table.prompts))
    *_, (predicted, _) = CrossFit(features, table.kept, table.budgets, n_folds, settings.components).predict(settings)
    return predicted


def first_tested(settings: Settings, features: Features, fit: Table, keep: Sequence[float]) -> list[int]:
    """For each value of `keep` the place of the price that is tested first, from predictions out of fold.

    Args:
        settings: of the controller.
        features: what it reads of the prompts.
        fit: prompts to train and to tune.
        keep: the bounds.
    """
    if max(keep) < 1:
        return [0 for _ in keep]
    path = PricePath.of(out_of_fold(settings, features, fit), fit.losses, fit.budgets)
    return [first_price(path, alpha_of(level), fit.full) for level in keep]


def priced_on_halves(predicted: Floats, table: Table, alpha: float) -> Choices:
    """Plan of each prompt [N] at the price whose mean loss on the other half of the prompts is at most `alpha`."""
    halves = np.array_split(np.random.default_rng(0).permutation(len(table.prompts)), 2)
    chosen = np.zeros(len(table.prompts), dtype=np.intp)
    for seen, unseen in (halves, halves[::-1]):
        half = table.rows(seen)
        price = price_for_loss(predicted[seen], half.kept, half.budgets, alpha * half.unit)
        chosen[unseen] = choose(predicted[unseen], table.budgets, price)
    return chosen


def pooled_gain(predicted: Floats, rivals: Mapping[str, Floats], table: Table, alpha: float) -> dict[str, Any]:
    """The gain of a controller over mixtures of static plans and over rivals at any price, at one mean loss.

    Args:
        predicted: by the controller, out of fold [N, K].
        rivals: name -> the same by another controller.
        table: the prompts.
        alpha: mean loss that the controller's price is picked for.
    """
    rows = np.arange(len(table.prompts))
    chosen = priced_on_halves(predicted, table, alpha)
    statics = np.broadcast_to(table.budgets[:, None], table.scores.T.shape)
    curves = {MIXTURE: Curve(statics, table.scores.T)}
    curves |= {name: _curve(expected, table) for name, expected in rivals.items()}
    found = gains(table.budgets[chosen], table.scores[rows, chosen], table.full, curves)
    return {
        "prompts": len(rows),
        "alpha": alpha,
        "budget": float(table.budgets[chosen].mean()),
        "against": {name: asdict(gain) for name, gain in found.items()},
    }


def _curve(predicted: Floats, table: Table) -> Curve:
    prices = [None, *PRICES[::STEP]]
    chosen = np.stack([choose(predicted, table.budgets, price) for price in prices])
    return Curve(table.budgets[chosen], table.scores[np.arange(len(table.prompts)), chosen])


def knows_the_prompt(against: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether a controller scores more, beyond noise, than each rival that does not look at the prompt.

    These are the same controller with another prompt's features and, if there are several tasks, with the task's name.
    """
    blind = [against[name]["score_gained"]["low"] for name in BLIND if name in against]
    return "shuffled" in against and min(blind) > 0
