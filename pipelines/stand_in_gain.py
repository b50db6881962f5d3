"""What the stand-ins are worth: the test prompts under the same plans with the model as it came."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from backbone.stand_ins.attaching import attach, detach
from oracle.frontier.frontier import (
    Point,
    equal_mean_budget,
    oracle_hull,
    own_score_budget,
    static_points,
    sufficient_plans,
    upper_hull,
)
from oracle.labels.reader import judged
from pipelines.labelling import labelled_scores
from pipelines.learning_table import Table
from pipelines.workspace import Workspace


def before_and_after(workspace: Workspace, test: Table) -> dict[str, Any]:
    """How the stand-ins were made, and the curves of static plans and of the oracle without and with them.

    Labels the test prompts under the frozen plans, unless there are no stand-ins or `evaluation.frozen` is off; then,
    or where judges fail on all full answers, `before` is missing.
    """
    record = json.loads(workspace.path("adapt.json").read_text())
    found = {"method": record["method"], "after": _curves(test.scores, test.budgets, workspace.config.label.tolerance)}
    if workspace.stand_ins.is_empty or not workspace.config.evaluation.frozen:
        return found
    model, tokenizer = workspace.adapted
    menu = workspace.frozen_menu()
    detach(model)
    try:
        labeller = workspace.labeller_of(model, tokenizer)
        scores = labelled_scores(labeller, test.prompts, menu, "labels without stand-ins")
    finally:
        attach(model, workspace.stand_ins)
    _, scores = judged(scores)
    if not len(scores):
        return found
    return found | {"before": _curves(scores, np.array(menu.budgets), workspace.config.label.tolerance)}


def _curves(scores: np.ndarray, budgets: np.ndarray, tolerance: float) -> dict[str, Any]:
    statics = static_points(scores, budgets)
    return {
        "static": statics,
        "static_hull": upper_hull(statics),
        "oracle_hull": _plain(oracle_hull(scores, budgets)),
        "equal_mean_budget": equal_mean_budget(scores, budgets),
        "own_score_budget": own_score_budget(sufficient_plans(scores, tolerance), budgets),
    }


def _plain(points: list[Point]) -> list[Point]:
    return [(float(budget), float(quality)) for budget, quality in points]
