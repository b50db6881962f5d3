"""Stage 9: one self-contained HTML page, and the run in MLflow."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from numpy.typing import NDArray

from backbone.files import write_atomically
from controller.certificate.certificate import alpha_of
from controller.certificate.fewest_prompts import fewest_prompts
from controller.certificate.p_values import CalibrationError
from controller.learning import FittedPredictor
from controller.report.report_card import price_curve
from oracle.frontier.frontier import Point, least_sufficient, oracle_hull, static_points, upper_hull
from oracle.frontier.split_half import corrected_climb, corrected_path
from oracle.labels.store import Label
from pipelines.config import Config
from pipelines.evaluation import figures, first_screen, summary
from pipelines.evaluation.examples import RULE
from pipelines.evaluation.learning_table import Table
from pipelines.evaluation.omissions import Omissions
from pipelines.evaluation.summary import load_metrics
from pipelines.run.progress import waiting
from pipelines.run.state import RunState
from pipelines.run.tracking import log_run
from pipelines.run.workspace import Workspace
from pipelines.stages.train import load_trained
from runtime.allocator import Allocator

YARDSTICKS = ("full", "best_static", "static_mixture", "random", "oracle")


def run(config: Config) -> Path:
    """Writes `report.html`, then logs the run to `tracking.uri`."""
    workspace = Workspace.of(config)
    table = workspace.table("test")
    metrics = load_metrics(config)
    choices = json.loads(workspace.path("choices.json").read_text())["chosen"]
    chosen = np.array(choices[metrics["best"]])
    tasks = _task_rows(workspace, table, chosen)
    tuning = json.loads(workspace.path("tuning.json").read_text())
    policies = [*YARDSTICKS, *tuning["controllers"]]
    left_out = Omissions()
    drawn = _figures(workspace, table, metrics, chosen, tasks, policies, tuning, left_out)
    environment = Environment(loader=PackageLoader(__package__, "."), autoescape=True, undefined=StrictUndefined)
    page = environment.get_template("report.html.j2").render(
        config=config,
        metrics=metrics,
        screen=_screen(metrics),
        figures=drawn,
        left_out={**metrics["left_out"], **left_out},
        names=figures.NAMES,
        colours=figures.COLOURS,
        policies=policies,
        plans=_plan_rows(workspace, table, metrics),
        rule=RULE,
        examples=_examples(workspace, table, chosen, {row["id"] for row in metrics["examples"]}),
        tighter=_tighter(metrics["certificate"]),
        tasks=tasks,
        tuning=tuning,
        compared=_compared(metrics["comparison"]),
        searched=metrics["prompts"]["train"] + metrics["prompts"]["tune"] >= config.tuning.search_from,
        seconds=RunState(config).seconds(),
        n_layers=workspace.menu().n_layers,
        today=date.today().isoformat(),
    )
    write_atomically(workspace.path("report.html"), with_labels(page))
    with waiting(f"logging to {config.tracking.uri}"):
        log_run(config, metrics, drawn, config.folder)
    return workspace.path("report.html")


def _screen(metrics: dict[str, Any]) -> dict[str, Any]:
    """The sentences that depend on what was found."""
    made = (first_screen.headline, first_screen.lead, first_screen.layers_tile, first_screen.quality_tile)
    others = (first_screen.numbers, summary.rival, summary.gains, summary.exceeds_limit)
    return {make.__name__: make(metrics) for make in (*made, *others)}


def _figures(
    workspace: Workspace,
    table: Table,
    metrics: dict[str, Any],
    chosen: NDArray[np.intp],
    tasks: list[dict[str, Any]],
    policies: Sequence[str],
    tuning: dict[str, Any],
    left_out: Omissions,
) -> dict[str, str]:
    """Name -> picture, of those that can be drawn."""
    outliers = Allocator.from_pretrained(workspace.path("allocator")).outliers
    trained, decided = load_trained(workspace), load_trained(workspace, outliers)
    menu, statics = workspace.menu(), static_points(table.scores, table.budgets)
    used: dict[str, list[float]] = defaultdict(list)
    for prompt, index in zip(table.prompts, chosen, strict=True):
        used[prompt.task].append(menu.plans[index].layers)
    draw: dict[str, Callable[[], str]] = {
        "quality": lambda: figures.quality_against_budget(
            statics,
            upper_hull(statics),
            {
                "oracle frontier (flattered)": oracle_hull(table.scores, table.budgets),
                "oracle frontier, corrected for luck": _corrected(table),
            },
            {name: _curve(learned, table) for name, learned in decided.items()},
            {name: (metrics[name]["budget"], metrics[name]["quality"]) for name in policies},
        ),
        "tasks": lambda: figures.layers_by_task(
            {row["task"]: (row["needed"], row["layers"]) for row in tasks},
            menu.n_layers,
            figures.COLOURS[metrics["best"]],
        ),
        "prompts": lambda: figures.layers_of_prompts(used, menu.n_layers),
        "reliability": lambda: figures.reliability(
            {name: (learned.predict(table.features), table.kept) for name, learned in trained.items()}
        ),
        "importance": lambda: figures.importance(
            {name: found["importance"] for name, found in tuning["controllers"].items()}
        ),
    }
    drawn = {}
    for name, make in draw.items():
        with left_out.guard(f"the picture {name!r}"):
            drawn[name] = make()
    return drawn


def _curve(learned: FittedPredictor, table: Table) -> list[Point]:
    return price_curve(learned.predict(table.features), table.scores, table.budgets)


def _corrected(table: Table) -> list[Point]:
    steps = corrected_climb(table.scores, table.budgets)
    return [(float(x), float(y)) for x, y in corrected_path(steps, table.scores, table.budgets)]


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


def _plan_rows(workspace: Workspace, table: Table, metrics: dict[str, Any]) -> list[dict[str, Any]]:
    """Each plan of the menu: what runs, what it costs, how good it is alone, how often it was chosen."""
    menu, speed = workspace.menu(), metrics["speed"]
    return [
        {
            "text": str(plan),
            "layers": plan.layers,
            "budget": budget,
            "cells": [
                ("a" if i in plan.attention else "") + ("m" if i in plan.mlp else "") for i in range(plan.n_layers)
            ],
            "quality": float(table.scores[:, index].mean()),
            "sufficient": float(table.sufficient[:, index].mean()),
            "speedup": speed["plan_intervals"][index],
            "chosen": metrics[metrics["best"]]["plan_shares"][index],
        }
        for index, (plan, budget) in enumerate(zip(menu.plans, menu.budgets, strict=True))
    ]


def _task_rows(workspace: Workspace, table: Table, chosen: NDArray[np.intp]) -> list[dict[str, Any]]:
    """Each kind of prompt: how many, scores of the full model and of the allocator, layers."""
    layers = np.array([plan.layers for plan in workspace.menu().plans])
    rows = []
    for task in sorted({prompt.task for prompt in table.prompts}):
        of_task = np.array([i for i, prompt in enumerate(table.prompts) if prompt.task == task])
        rows.append(
            {
                "task": task,
                "n": len(of_task),
                "full": float(table.scores[of_task, -1].mean()),
                "allocator": float(table.scores[of_task, chosen[of_task]].mean()),
                "worse": float((table.scores[of_task, chosen[of_task]] < table.scores[of_task, -1]).mean()),
                "better": float((table.scores[of_task, chosen[of_task]] > table.scores[of_task, -1]).mean()),
                "layers": float(layers[chosen[of_task]].mean()),
                "needed": float(layers[least_sufficient(table.sufficient)[of_task]].mean()),
            }
        )
    return sorted(rows, key=lambda row: row["layers"])


def _examples(
    workspace: Workspace, table: Table, chosen: NDArray[np.intp], above: set[str], per_task: int = 2
) -> list[dict[str, Any]]:
    """Some test prompts of every task, first those whose answer changed, with both answers.

    Args:
        above: ids of the prompts that are shown already, answered and decided once more.
    """
    menu = workspace.menu()
    labels = workspace.labels.read(table.prompts, menu)
    shown: dict[str, list[dict[str, Any]]] = defaultdict(list)
    rows = [(prompt, row, index) for prompt, row, index in zip(table.prompts, labels, chosen, strict=True)]
    for prompt, row, index in sorted(rows, key=lambda item: item[1][item[2]].answer == item[1][-1].answer):
        if prompt.id not in above and len(shown[prompt.task]) < per_task:
            shown[prompt.task].append(
                _example(
                    prompt.task,
                    prompt.shown,
                    prompt.shown_references,
                    menu.plans[index].layers,
                    row[index],
                    row[-1],
                )
            )
    return [example for task in sorted(shown) for example in shown[task]]


def _example(task: str, prompt: str, reference: str, layers: float, label: Label, full: Label) -> dict[str, Any]:
    return {
        "task": task,
        "prompt": prompt,
        "reference": reference,
        "layers": layers,
        "plan": label.plan,
        "answer": label.answer,
        "score": float(np.nan_to_num(label.score)),  # 0 where the judge failed
        "full_answer": full.answer,
        "full_score": full.score,
    }


def _tighter(certificate: dict[str, Any]) -> list[dict[str, Any]]:
    """How many calibration prompts tighter bounds take: at least, and if the loss seen were half the bound; none where
    already nothing may be lost."""
    if (asked := alpha_of(certificate["keep"])) <= 0:
        return []
    delta, risk, full = certificate["delta"], certificate["risk"], round(certificate["full_score"], 4)
    found = []
    for alpha in (asked / part for part in (2, 5, 10)):
        with suppress(CalibrationError):  # more than can be looked at
            least, half = (fewest_prompts(alpha, delta, risk, lost, full) for lost in (0.0, alpha / 2))
            found.append({"alpha": alpha, "least": least, "half": half})
    return found
