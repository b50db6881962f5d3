"""Figures of a finished run that repeat: its labelled prompts dealt anew to the splits, many times.

    python benchmarks/redraws.py --run runs/demo --name demo

One split of a hundred test prompts is an anecdote. In each draw a random part of all labelled prompts, as large as
the run's, is what controllers learn from. Their settings and the best of them are found anew, by the rule of the
stage `tune`. The other prompts stand for the population: prompts to calibrate on and to test on are drawn from them
with replacement, in the run's sizes; `--calibrations` draws them several times for each part learned from, which is
most of the time. The control that sees the task's name alone has the same choice of controllers,
the same rule for settings and the same outlier test. Reported is the mean over the draws and the range that holds 90%
of them, which is where a fresh run on such prompts, here or elsewhere, should lie. Draws share prompts, and menu and
bridges are the run's, so the mean is known less well than their number suggests. `broken` is the share of the draws
in which the mean loss of the whole population exceeds any bound that was certified. What the run left out of the labels
of its prompts to calibrate is generated first. Finished draws are kept in the run's folder, so that a stopped command
goes on. Writes benchmarks/results/redraws-NAME.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from functools import cache
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import workload
from prices import price_of
from redrawn_splits import Draw, Rows

from controller.base import FittedPredictor
from controller.learning import Settings, learn
from controller.report.report_card import report_card
from oracle.frontier.bootstrap import percentile_interval
from oracle.frontier.knapsack import cheapest_choices
from pipelines.config import Config, load_config
from pipelines.evaluation.controls import with_task
from pipelines.evaluation.learning_table import Table
from pipelines.run.progress import progress
from pipelines.run.workspace import Workspace
from pipelines.stages.calibrate import first_tested, outlier_test
from pipelines.stages.evaluate import best_static
from pipelines.stages.settings_search import (
    Work,
    default_settings,
    first_trial,
    sampler,
    settings_of,
    settled,
)
from pipelines.stages.train import out_of_fold

RESULTS = Path(__file__).parent / "results"
LEVEL = 0.9
CONTROL = "task"
"""The control that knows the kind of each prompt and nothing else of it; the hardest to beat."""


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--run", type=Path, default=Path("runs/demo"), help="folder of a finished run")
    options.add_argument("--name", default="demo", help="name in the result's file")
    options.add_argument("--draws", type=int, default=40, help="parts to learn from")
    options.add_argument("--calibrations", type=int, default=1, help="draws to calibrate and to test, of each part")
    options.add_argument("--workers", type=int, default=1, help="processes that share the draws")
    options.add_argument("--default-settings", action="store_true", help="no search of settings in each draw")
    arguments = options.parse_args()
    config = load_config(arguments.run / "config.yaml")
    config = config.model_copy(update={"runs": arguments.run.parent, "name": arguments.run.name})
    if arguments.default_settings:
        config = with_default_settings(config)
    model = {"model": config.model.source, "data": config.data.path, "run": arguments.run.name}
    path = RESULTS / f"redraws-{arguments.name}.json"
    result = redrawn(config, arguments.draws, arguments.workers, arguments.calibrations)
    workload.write(path, argparse.Namespace(**vars(arguments) | model), result)


def with_default_settings(config: Config) -> Config:
    """Redraws try the default settings of each controller alone: a search in each draw would take hours."""
    return config.model_copy(update={"tuning": config.tuning.model_copy(update={"trials": 1})})


def redrawn(config: Config, draws: int, workers: int = 1, calibrations: int = 1) -> dict[str, Any]:
    """Mean and range over the draws of every figure of every policy, beside the sizes of the splits."""
    workspace = Workspace(config)
    workload.table_in_full(workspace)
    key = hashlib.sha256(f"{config.model_dump_json()} {calibrations}".encode()).hexdigest()[:8]
    finished = workspace.path(f"redraws-{key}.jsonl")
    finished.touch()
    found = dict(json.loads(line) for line in finished.read_text().splitlines())
    missing = [draw for draw in range(draws) if draw not in found]
    with (
        ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool,
        progress("draws", len(missing)) as advance,
        finished.open("a") as file,
    ):
        spread = map if workers == 1 else pool.map
        for draw, figures in zip(missing, spread(_figures, repeat(config), missing, repeat(calibrations)), strict=True):
            found[draw] = figures
            print(json.dumps([draw, figures]), file=file, flush=True)
            advance(1)
    figures = [each for draw in range(draws) for each in found[draw]]
    return {
        "draws": draws,
        "calibrations": calibrations,
        "level": LEVEL,
        "prompts": {name: len(some) for name, some in workspace.prompts.labelled_splits.items()},
        "policies": {
            name: {key: _summary([each[name][key] for each in figures]) for key in of_one}
            for name, of_one in figures[0].items()
        },
    }


@cache
def _material(config: str) -> tuple[Workspace, Table]:
    """What all draws of a process share."""
    workspace = Workspace(Config.model_validate_json(config))
    return workspace, workload.table_in_full(workspace)


def _figures(config: Config, number: int, calibrations: int) -> list[dict[str, dict[str, Any]]]:
    """Of the draws of one part to learn from, each on its test prompts: the allocator, the control, the best static
    plan, and the oracle."""
    workspace, table = _material(config.model_dump_json())
    sizes = {name: len(some) for name, some in workspace.prompts.labelled_splits.items()}
    draws = Draw.of(len(table.prompts), sizes, number, calibrations)
    fit = table.rows(draws[0].fit)
    named = replace(table, features=with_task(table, fit.tasks))
    learned, starts = _best(config, fit, config.tuning.feature_sets)
    outliers = outlier_test(learned, fit, draws[0].held, config)
    control, of_control = _best(config, named.rows(draws[0].fit), [[CONTROL]])

    def of(draw: Draw) -> dict[str, dict[str, Any]]:
        test = table.rows(draw.test)
        static = best_static(config, table.rows(draw.calibrate), fit)
        oracle = cheapest_choices(test.scores, test.budgets, float(test.full.mean()))
        return {
            "allocator": _allocated(workspace, replace(learned, outliers=outliers), starts, table, draw),
            CONTROL: _allocated(workspace, replace(control, outliers=outliers), of_control, named, draw),
            "best_static": _card(workspace, np.full(len(test.prompts), static), test),
            "oracle": _card(workspace, oracle, test),
        }

    return [of(draw) for draw in draws]


def _best(config: Config, fit: Table, sets: list[list[str]]) -> tuple[FittedPredictor, list[int]]:
    """What the controller of least regret learned, with the settings that the stage `tune` would take, and for each
    value of `calibration.keep` the place of the price that is tested first."""
    tuning = config.tuning.model_copy(update={"feature_sets": sets, "given": {}})
    work = Work.of(fit, config.calibration.alpha, tuning)
    best = min((settings_for(name, work) for name in tuning.controllers), key=work.judge)
    starts = first_tested(out_of_fold(best, fit.features, fit), fit, config.calibration.keep)
    return learn(best, fit.features, fit.losses, fit.budgets), starts


def settings_for(name: str, work: Work) -> Settings:
    """A controller's settings by the rule of the stage `tune`, from a search that nothing keeps."""
    return settled(work, searched(name, work))[0] if work.is_searched else default_settings(name, work.tuning)


def searched(name: str, work: Work) -> Settings:
    """The settings of least regret of `tuning.trials` trials, the first of which tries the defaults."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=sampler(0))
    study.enqueue_trial(first_trial(name, work.tuning))
    study.optimize(lambda trial: work.judge(settings_of(name, trial, work.tuning)), n_trials=work.tuning.trials)
    return settings_of(name, study.best_trial, work.tuning)


def _allocated(
    workspace: Workspace, learned: FittedPredictor, starts: list[int], table: Table, draw: Draw
) -> dict[str, Any]:
    """Of one controller, certified on the draw's prompts at every level: measured at the first on its test prompts, and
    whether the population breaks the bound, for any of them and for each (`broken_KEEP`, `budget_KEEP`)."""
    test, calibrate, population = (table.rows(rows) for rows in (draw.test, draw.calibrate, draw.population))
    expected = [learned.predict(some.features) for some in (calibrate, test, population)]
    calibration, found = workspace.config.calibration, {}
    for keep, start in zip(calibration.keep, starts, strict=True):
        price = price_of(expected[0], calibrate, calibration, keep, start=start)
        served, whole = (
            _card(workspace, some.rule.choose(own, price), some)
            for own, some in zip(expected[1:], (test, population), strict=True)
        )
        if not found:
            found = {**served, "certified": float(price is not None)}
        found[f"broken_{keep:g}"] = float(price is not None and whole["loss"] > 1 - keep)
        found[f"budget_{keep:g}"] = served["budget"]
    return {**found, "broken": max(found[f"broken_{keep:g}"] for keep in calibration.keep)}


def _card(workspace: Workspace, chosen: Rows, test: Table) -> dict[str, Any]:
    layers = [plan.layers for plan in workspace.menu().plans]
    card = asdict(report_card(chosen, test.scores, test.losses, test.budgets, layers, test.unit))
    return {name: card[name] for name in ("layers", "budget", "quality_ratio", "loss", "worse", "better")}


def _summary(values: list[float | None]) -> dict[str, float | None]:
    """Mean, and the ends of the range that holds 90% of the draws; draws in which it is not defined are left out."""
    known = np.array([np.nan if value is None else value for value in values])
    if np.isnan(known).all():
        return {"mean": None, "low": None, "high": None}
    low, high = percentile_interval(known, LEVEL)
    return {"mean": float(np.nanmean(known)), "low": low, "high": high}


if __name__ == "__main__":
    main()
