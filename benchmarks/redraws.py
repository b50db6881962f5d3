"""Figures of a finished run that repeat: its labelled prompts dealt anew to the splits, many times.

    python benchmarks/redraws.py --run runs/demo --name demo

One split of a hundred test prompts is an anecdote. Here all labelled prompts are dealt anew, in the run's own sizes, to
those that a controller learns from, those that calibrate it and those that test it, with the settings that the run
found; the test prompts of each draw were seen by nothing. Reported is the mean over the draws and the range that holds
90% of them, which is where a fresh run on such prompts, here or elsewhere, should lie. Draws share prompts, so the mean
is known less well than their number suggests. Nothing is generated. Writes benchmarks/results/redraws-NAME.json.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import workload
from numpy.typing import NDArray

from controller.base import choose
from controller.learning import Settings, learn
from controller.report.report_card import report_card
from oracle.frontier.bootstrap import percentile_interval
from oracle.frontier.knapsack import cheapest_choices
from oracle.prompts import SPLITS
from pipelines.config import Config, load_config
from pipelines.controls import control_features
from pipelines.learning_table import Table
from pipelines.progress import progress
from pipelines.stages.calibrate import price_of
from pipelines.stages.evaluate import best_static
from pipelines.stages.train import tuned_settings
from pipelines.unseen_tasks import outlier_test
from pipelines.workspace import Workspace
from runtime.allocator import Allocator

RESULTS = Path(__file__).parent / "results"
LEVEL = 0.9
CONTROL = "task"
"""The control that knows the kind of each prompt and nothing else of it; the hardest to beat."""

Rows = NDArray[np.intp]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--run", type=Path, default=Path("runs/demo"), help="folder of a finished run")
    options.add_argument("--name", default="demo", help="name in the result's file")
    options.add_argument("--draws", type=int, default=40)
    arguments = options.parse_args()
    config = load_config(arguments.run / "config.yaml")
    config = config.model_copy(update={"runs": arguments.run.parent, "name": arguments.run.name})
    model = {"model": config.model.source, "data": config.data.path, "run": arguments.run.name}
    path = RESULTS / f"redraws-{arguments.name}.json"
    workload.write(path, argparse.Namespace(**vars(arguments) | model), redrawn(config, arguments.draws))


def redrawn(config: Config, draws: int) -> dict[str, Any]:
    """Mean and range over the draws of every figure of every policy, beside the sizes of the splits."""
    workspace = Workspace.of(config)
    table, sizes = workspace.table(*SPLITS), {name: len(some) for name, some in workspace.labelled_splits.items()}
    settings = tuned_settings(workspace)[Allocator.from_pretrained(config.folder / "allocator").controller_name]
    found = []
    with progress("draws", draws) as advance:
        for draw in range(draws):
            order = np.random.default_rng(draw).permutation(len(table.prompts))
            ends = np.cumsum([sizes["test"], sizes["calibrate"]])
            found.append(_figures(workspace, settings, table, np.split(order, ends)))
            advance(1)
    policies = {name: {key: [draw[name][key] for draw in found] for key in found[0][name]} for name in found[0]}
    summary = {name: {key: _summary(values) for key, values in some.items()} for name, some in policies.items()}
    return {"draws": draws, "level": LEVEL, "prompts": sizes, "policies": summary}


def _figures(workspace: Workspace, settings: Settings, table: Table, parts: list[Rows]) -> dict[str, dict[str, Any]]:
    """Of one draw, on its test prompts: the allocator, the control, the best static plan, and the oracle."""
    test, calibrate = table.rows(parts[0]), table.rows(parts[1])
    features, sets = control_features(CONTROL, table, settings.sets)
    named = Settings(settings.name, sets, settings.components, settings.parameters)
    control = replace(table, features=features)
    static = best_static(workspace.config, calibrate, table.rows(parts[2]))
    return {
        "allocator": _allocated(workspace, settings, table, parts, len(workspace.labelled_splits["tune"])),
        CONTROL: _allocated(workspace, named, control, parts),
        "best_static": _card(workspace, np.full(len(test.prompts), static), test),
        "oracle": _card(workspace, cheapest_choices(test.scores, test.budgets, float(test.full.mean())), test),
    }


def _allocated(
    workspace: Workspace, settings: Settings, table: Table, parts: list[Rows], held: int = 0
) -> dict[str, Any]:
    """Of one controller; `held` of the prompts that it is fitted on make the threshold of the outlier test, if any."""
    test, calibrate, fit = (table.rows(rows) for rows in parts)
    learned = learn(settings, fit.features, fit.kept, fit.budgets)
    if held:
        of_test = np.arange(len(fit.prompts)) < held
        learned = replace(learned, outliers=outlier_test(learned, fit, of_test, workspace.config))
    price = price_of(learned.predict(calibrate.features), calibrate, workspace.config.calibration)
    chosen = choose(learned.predict(test.features), test.budgets, price)
    card = _card(workspace, chosen, test)
    within = card["loss"] <= workspace.config.calibration.alpha
    return {**card, "certified": float(price is not None), "within_bound": float(within)}


def _card(workspace: Workspace, chosen: Rows, test: Table) -> dict[str, Any]:
    layers = [plan.layers for plan in workspace.menu().plans]
    card = asdict(report_card(chosen, test.scores, test.kept, test.budgets, layers, test.unit))
    return {name: card[name] for name in ("layers", "budget", "quality_ratio", "loss", "captured_headroom")}


def _summary(values: list[float | None]) -> dict[str, float | None]:
    """Mean, and the ends of the range that holds 90% of the draws; draws in which it is not defined are left out."""
    known = np.array([np.nan if value is None else value for value in values])
    if np.isnan(known).all():
        return {"mean": None, "low": None, "high": None}
    low, high = percentile_interval(known, LEVEL)
    return {"mean": float(np.nanmean(known)), "low": low, "high": high}


def results_table(result: dict[str, Any]) -> str:
    """The policies in Markdown: each figure's mean and range."""
    lines = [
        "| policy | layers | of the decoder | mean score, of full |",
        "| --- | --- | --- | --- |",
    ]
    for name, found in result["policies"].items():
        shares = [_cell(found[key], 100, "%") for key in ("budget", "quality_ratio")]
        cells = [_cell(found["layers"], 1, ""), *shares]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(found: dict[str, float], scale: float, unit: str) -> str:
    mean, low, high = (f"{scale * found[key]:.1f}" for key in ("mean", "low", "high"))
    return f"{mean}{unit} ({low} to {high})"


if __name__ == "__main__":
    main()
