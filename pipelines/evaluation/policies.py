"""What policies spend, lose and capture at a mean loss that was asked for.

Shapes: `N` prompts, `K` plans.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from controller.base import Floats, choose
from controller.certificate.certificate import alpha_of
from controller.report.headroom import captured_by
from controller.report.report_card import price_for_loss
from pipelines.evaluation.learning_table import Table

Choices = NDArray[np.intp]
Rows = list[dict[str, Any]]


def chosen_at(seen: Floats, predicted: Floats, known: Table, test: Table, keep: float) -> Choices:
    """Plans of the prompts of `test`, at the price whose mean loss on the prompts of `known` is at most 1 - `keep`.

    Args:
        seen: what is expected of the prompts of `known` [N, K], out of fold if the controller learned from them.
        predicted: likewise of `test`.
    """
    price = price_for_loss(seen, known.kept, known.budgets, alpha_of(keep) * known.unit)
    return choose(predicted, test.budgets, price)


def measured(keep: float, chosen: Mapping[str, Choices], test: Table, controls: frozenset[str] = frozenset()) -> Rows:
    """A row for each policy, with what it captures of the headroom."""
    captured = captured_by(chosen, test.scores, test.budgets, controls)
    return [
        {"keep": keep, "policy": name, **outcome(choice, test), **asdict(captured[name])}
        for name, choice in chosen.items()
    ]


def outcome(chosen: Choices, test: Table) -> dict[str, float]:
    """Mean budget, mean loss, and the mean score in shares of the full model's."""
    rows = np.arange(len(chosen))
    return {
        "budget": float(test.budgets[chosen].mean()),
        "loss": float(test.losses[rows, chosen].mean()) / test.unit,
        "quality_ratio": float(test.scores[rows, chosen].mean() / max(test.full.mean(), 1e-12)),
    }
