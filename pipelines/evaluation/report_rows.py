"""What the report shows of a finished run: rows of its tables and marks of its figures."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backbone.plan import PlanMenu
from controller.report.headroom import Estimate
from oracle.frontier.frontier import least_sufficient
from pipelines.evaluation import summary
from pipelines.evaluation.bands import Spot, spot
from pipelines.evaluation.figures import Contestant, Dot
from pipelines.evaluation.learning_table import Table
from pipelines.evaluation.svg import colour_of, title_of
from pipelines.run.workspace import Workspace

YARDSTICKS = ("full", "best_static", "static_mixture", "random", "oracle")
DRAWN_AT_RANDOM = ("static_mixture", "random")
STOCK = Contestant(
    "stock generate()", "stock generate()", colour_of("full"), Estimate(1.0, None, None), Estimate(1.0, None, None)
)
Metrics = dict[str, Any]
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Measured:
    """What the run measured on the test prompts.

    Attributes:
        menu, table, metrics: of the run.
        policies: names of those that are compared.
        chosen: plan of each prompt under the best controller [N].
        spots: each policy with its intervals; one that draws plans at random has the intervals of its mean.
    """

    menu: PlanMenu
    table: Table
    metrics: Metrics
    policies: Sequence[str]
    chosen: NDArray[np.intp]
    spots: dict[str, Spot]

    @classmethod
    def of(cls, workspace: Workspace) -> Measured:
        menu, table, metrics = workspace.menu(), workspace.table("test"), summary.load_metrics(workspace.config)
        chosen, plans = workspace.read("choices.json")["chosen"], np.eye(len(menu))
        policies = [*YARDSTICKS, *workspace.read("tuning.json")["controllers"]]
        shares = {
            name: np.tile(metrics[name]["plan_shares"], (len(table.prompts), 1))
            if name in DRAWN_AT_RANDOM
            else plans[chosen[name]]
            for name in (*policies, "full_with_head")
            if name in metrics
        }
        spots = {name: _at(metrics[name], spot(own, table.scores, table.budgets)) for name, own in shares.items()}
        return cls(menu, table, metrics, policies, np.array(chosen[metrics["best"]]), spots)

    @property
    def best(self) -> Spot:
        return self.spots[self.metrics["best"]]


def _at(card: Row, found: Spot) -> Spot:
    """The spot at the means of the policy's own draws."""
    budget, quality = replace(found.budget, value=card["budget"]), replace(found.quality, value=card["quality"])
    return replace(found, budget=budget, quality=quality)


def contestant_rows(metrics: Metrics, spots: dict[str, Spot]) -> list[Row]:
    """What answers requests: its figures, and how many times as fast as stock it is; None where it was not timed."""
    speed, best = metrics["speed"], metrics["best"]
    rows = [{"name": "full model, stock generate()", "spot": spots["full"], "single": None, "batch": None}]
    for name in ("full_with_head", "best_static"):
        if name in spots:
            plan = int(np.argmax(metrics[name]["plan_shares"]))
            row = {"single": None, "batch": speed["plan_intervals"][plan]}
            rows.append({"name": f"{title_of(name)}, {metrics['model']['plans'][plan]}", "spot": spots[name], **row})
    rows.append({"name": "allocator", "spot": spots[best], **speed["intervals"]})
    exact = {"single": speed["limit"], "batch": None}
    return [*rows, {"name": "the same layers deleted, without a decision", "spot": spots[best], **exact}]


def timed_alone(measured: Measured) -> list[Contestant]:
    speed, kept, deleted = measured.metrics["speed"], measured.best.kept, "the same layers deleted"
    single, colour = _estimate(speed["intervals"]["single"]), colour_of(measured.metrics["best"])
    return [
        STOCK,
        Contestant(deleted, deleted, colour_of("random"), kept, _estimate(speed["limit"])),
        Contestant("allocator", "allocator", colour, kept, single),
    ]


def timed_in_batches(measured: Measured) -> list[Contestant]:
    metrics, table, colour = measured.metrics, measured.table, colour_of("static_mixture")
    plans = np.eye(len(measured.menu))
    statics = [
        Contestant(f"static plan {plan}", "static plans", colour, at.kept, _estimate(ratio))
        for plan, shares, ratio in zip(measured.menu.plans, plans, metrics["speed"]["plan_intervals"], strict=True)
        for at in [spot(np.tile(shares, (len(table.prompts), 1)), table.scores, table.budgets)]
        if not plan.is_full
    ]
    ratio = _estimate(metrics["speed"]["intervals"]["batch"])
    own = Contestant("allocator", "allocator", colour_of(metrics["best"]), measured.best.kept, ratio)
    return [STOCK, *statics, own]


def _estimate(ratio: Row) -> Estimate:
    return Estimate(ratio["value"], ratio["low"], ratio["high"])


def dots(measured: Measured) -> list[Dot]:
    """Each test prompt with what a reader sees under the pointer."""
    table, plans = measured.table, [measured.menu.plans[plan] for plan in measured.chosen]
    scores = table.scores[np.arange(len(plans)), measured.chosen]
    return [
        Dot(
            prompt.task,
            plan.layers,
            float(score - full),
            f"{summary.ends(prompt.shown)}\nlayers {plan}, score {score:.3g} (full model {full:.3g})",
        )
        for prompt, plan, score, full in zip(table.prompts, plans, scores, table.full, strict=True)
    ]


def compared(comparison: Row) -> dict[str, dict[float, Row]]:
    """Policy -> what is to be kept -> what it captures there."""
    found: dict[str, dict[float, Row]] = defaultdict(dict)
    for row in comparison["at_losses"]:
        found[row["policy"]][row["keep"]] = row
    return dict(found)


def plan_rows(measured: Measured) -> list[Row]:
    """Each plan of the menu: what runs, what it costs, how good it is alone, how often it was chosen."""
    menu, table, metrics = measured.menu, measured.table, measured.metrics
    return [
        {
            "text": str(plan),
            "layers": plan.layers,
            "budget": budget,
            "cells": ["a" * (i in plan.attention) + "m" * (i in plan.mlp) for i in range(plan.n_layers)],
            "quality": float(table.scores[:, index].mean()),
            "sufficient": float(table.sufficient[:, index].mean()),
            "speedup": metrics["speed"]["plan_intervals"][index],
            "chosen": metrics[metrics["best"]]["plan_shares"][index],
        }
        for index, (plan, budget) in enumerate(zip(menu.plans, menu.budgets, strict=True))
    ]


def task_rows(measured: Measured) -> list[Row]:
    """Each kind of prompt: how many, scores of the full model and of the allocator, layers."""
    menu, table, chosen = measured.menu, measured.table, measured.chosen
    layers, rows = np.array([plan.layers for plan in menu.plans]), np.arange(len(chosen))
    scores, needed = table.scores[rows, chosen], layers[least_sufficient(table.sufficient)]
    found = [
        {
            "task": str(task),
            "n": int(own.sum()),
            "full": float(table.full[own].mean()),
            "allocator": float(scores[own].mean()),
            "worse": float((scores < table.full)[own].mean()),
            "better": float((scores > table.full)[own].mean()),
            "layers": float(layers[chosen[own]].mean()),
            "needed": float(needed[own].mean()),
        }
        for task in np.unique(table.tasks)
        for own in [table.tasks == task]
    ]
    return sorted(found, key=lambda row: row["layers"])
