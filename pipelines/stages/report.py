"""Stage 9: one self-contained HTML page, and the run in MLflow."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from numpy.typing import NDArray

from backbone.files import write_atomically
from backbone.plan import PlanMenu
from controller.report.report_card import price_curve
from oracle.frontier.frontier import least_sufficient, oracle_hull, static_points, upper_hull
from oracle.frontier.split_half import corrected_path, corrected_sweep
from pipelines.evaluation import figures, summary
from pipelines.evaluation.examples import RULE
from pipelines.evaluation.learning_table import Table
from pipelines.run.progress import Omissions, waiting
from pipelines.run.state import RunState
from pipelines.run.tracking import log_run
from pipelines.run.workspace import Workspace
from pipelines.stages.train import load_trained
from runtime.allocator import Allocator

YARDSTICKS = ("full", "best_static", "static_mixture", "random", "oracle")


def run(workspace: Workspace) -> Path:
    """Writes `report.html`, then logs the run to `tracking.uri`."""
    config, table, tuning = workspace.config, workspace.table("test"), workspace.read("tuning.json")
    metrics = summary.load_metrics(config)
    chosen = np.array(workspace.read("choices.json")["chosen"][metrics["best"]])
    tasks = _task_rows(workspace.menu(), table, chosen)
    policies, left_out = [*YARDSTICKS, *tuning["controllers"]], Omissions()
    drawn = _figures(workspace, table, metrics, tasks, policies, left_out)
    environment = Environment(loader=PackageLoader(__package__, "."), autoescape=True, undefined=StrictUndefined)
    page = environment.get_template("report.html.j2").render(
        config=config,
        metrics=metrics,
        headline=summary.headline(metrics),
        tiles=summary.tiles(metrics),
        rival=summary.rival(metrics),
        exceeds_limit=summary.exceeds_limit(metrics),
        figures=drawn,
        left_out={**metrics["left_out"], **left_out},
        title_of=figures.title_of,
        colour_of=figures.colour_of,
        policies=policies,
        plans=_plan_rows(workspace.menu(), table, metrics),
        rule=RULE,
        tasks=tasks,
        tuning=tuning,
        compared=_compared(metrics["comparison"]),
        searched=metrics["prompts"]["train"] + metrics["prompts"]["tune"] >= config.tuning.search_from,
        seconds=RunState(workspace).seconds(),
        today=date.today().isoformat(),
    )
    write_atomically(workspace.path("report.html"), with_labels(page))
    with waiting(f"logging to {config.tracking.uri}"):
        log_run(config, metrics, drawn, config.folder)
    return workspace.path("report.html")


def _figures(
    workspace: Workspace,
    table: Table,
    metrics: dict[str, Any],
    tasks: list[dict[str, Any]],
    policies: Sequence[str],
    left_out: Omissions,
) -> dict[str, str]:
    """Name -> picture, of those that can be drawn."""
    menu, statics = workspace.menu(), static_points(table.scores, table.budgets)
    outliers = Allocator.from_pretrained(workspace.path("allocator")).outliers
    trained, decided = load_trained(workspace), load_trained(workspace, outliers)
    corrected = corrected_path(corrected_sweep(table.scores, table.budgets), table.scores, table.budgets)
    draw: dict[str, Callable[[], str]] = {
        "quality": lambda: figures.quality_against_budget(
            statics,
            upper_hull(statics),
            {
                "oracle frontier (flattered)": oracle_hull(table.scores, table.budgets),
                "oracle frontier, corrected for luck": [(float(x), float(y)) for x, y in corrected],
            },
            {
                name: price_curve(learned.predict(table.features), table.scores, table.rule)
                for name, learned in decided.items()
            },
            {name: (metrics[name]["budget"], metrics[name]["quality"]) for name in policies},
        ),
        "tasks": lambda: figures.layers_by_task(
            {row["task"]: (row["needed"], row["layers"]) for row in tasks},
            menu.n_layers,
            figures.colour_of(metrics["best"]),
        ),
        "reliability": lambda: figures.reliability(
            {name: (learned.predict(table.features), table.losses) for name, learned in trained.items()}
        ),
    }
    drawn = {}
    for name, make in draw.items():
        with left_out.guard(f"the picture {name!r}"):
            drawn[name] = make()
    return drawn


_TABLE, _ROW, _HEADING = (re.compile(rf"<{name}\b.*?</{name}>", re.DOTALL) for name in ("table", "tr", "th"))


def with_labels(page: str) -> str:
    """The page with the heading of its column on every cell of its tables: on a narrow screen, where a row's cells
    stand below each other, each shows it (`report.html.j2`)."""
    return _TABLE.sub(lambda table: _labelled(table[0]), page)


def _labelled(table: str) -> str:
    headings = [re.sub("<[^>]*>", "", heading) for heading in _HEADING.findall(table)]

    def row(found: re.Match[str]) -> str:
        names = iter(headings)
        return re.sub("<td(?=[ >])", lambda cell: f'<td data-label="{next(names)}"', found[0])

    return _ROW.sub(row, table)


def _compared(comparison: dict[str, Any]) -> dict[str, dict[float, dict[str, Any]]]:
    """Policy -> what is to be kept -> what it captures there."""
    found: dict[str, dict[float, dict[str, Any]]] = defaultdict(dict)
    for row in comparison["at_losses"]:
        found[row["policy"]][row["keep"]] = row
    return dict(found)


def _plan_rows(menu: PlanMenu, table: Table, metrics: dict[str, Any]) -> list[dict[str, Any]]:
    """Each plan of the menu: what runs, what it costs, how good it is alone, how often it was chosen."""
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


def _task_rows(menu: PlanMenu, table: Table, chosen: NDArray[np.intp]) -> list[dict[str, Any]]:
    """Each kind of prompt: how many, scores of the full model and of the allocator, layers."""
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
