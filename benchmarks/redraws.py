"""Figures of a finished run that repeat: its labelled prompts dealt anew to the splits, many times.

    python benchmarks/redraws.py --run runs/demo --name demo

One split of a hundred test prompts is an anecdote. In each draw a random part of all labelled prompts, as large as the
run's, is what controllers learn from. Their settings and the best of them are found anew, by the rule of the stage
`tune`. The other prompts stand for the population: prompts to calibrate on and to test on are drawn from them with
replacement, in the run's sizes; `--calibrations` draws them several times for each part learned from, which is most of
the time. The control that sees the task's name alone has the same choice of controllers and the same rule for settings;
the controls that see another prompt's features or the mean embedding alone are of the best controller's kind at default
settings, as in a run's evaluation. All have the same outlier test. `beaten` is the share of the draws in which the
allocator runs less of the decoder than a control that is certified on the same prompts. Reported is the mean over the
draws and the range that holds 90% of them, which is where a fresh run on such prompts, here or elsewhere, should lie.
Draws share prompts, and menu and bridges are the run's, so the mean is known less well than their number suggests.
`broken` is the share of the draws in which the mean loss of the whole population exceeds any bound that was certified.
What the run left out of the labels of its prompts to calibrate is generated first. Finished draws are kept in the run's
folder, so that a stopped command goes on. Writes benchmarks/results/redraws-NAME.json.
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
from redrawn_splits import Draw, Rows

from controller.base import FittedPredictor
from controller.certificate.calibration import PricePath, cheapest_valid_plan, choices, valid_price
from controller.certificate.certificate import alpha_of
from controller.features import Features
from controller.learning import Settings, learn
from controller.report.report_card import report_card
from oracle.frontier.bootstrap import percentile_interval
from oracle.frontier.knapsack import cheapest_choices
from pipelines.config import Config, load_config
from pipelines.config.learning_sections import CalibrationSection
from pipelines.evaluation.controls import control_features, control_settings, with_task
from pipelines.evaluation.learning_table import Table
from pipelines.run.progress import progress
from pipelines.run.workspace import Workspace
from pipelines.stages.calibrate import first_tested, outlier_test, plan_for_all, rule_at
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
SEARCHED = "task"
"""The control that knows the kind of each prompt and nothing else of it; the hardest to beat, so it gets a search."""
AT_DEFAULTS = ("shuffled", "embedding")
"""Controls at default settings."""


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
    of_draws = f"{config.model_dump_json()} {calibrations} {SEARCHED} {AT_DEFAULTS}"
    key = hashlib.sha256(of_draws.encode()).hexdigest()[:8]
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
    """Of the draws of one part to learn from, each on its test prompts: the allocator, the controls, the best static
    plan, and the oracle."""
    workspace, table = _material(config.model_dump_json())
    sizes = {name: len(some) for name, some in workspace.prompts.labelled_splits.items()}
    draws = Draw.of(len(table.prompts), sizes, number, calibrations)
    fit = table.rows(draws[0].fit)
    named = replace(table, features=with_task(table, fit.tasks))
    best = _best(config, fit, config.tuning.feature_sets)
    named_fit = named.rows(draws[0].fit)
    by_name = _best(config, named_fit, [[SEARCHED]])
    learned = {
        "allocator": _learned(config, best, fit, fit.features),
        SEARCHED: _learned(config, by_name, named_fit, named_fit.features),
    }
    for name in AT_DEFAULTS:
        features, sets = control_features(name, fit, best.sets)
        learned[name] = _learned(config, control_settings(best, sets, config.tuning), fit, features)
    outliers = outlier_test(learned["allocator"][0], fit, draws[0].held, config)

    keeps = config.calibration.keep
    certified = {
        name: _allocated(
            workspace,
            replace(each, outliers=outliers),
            starts,
            keeps if name == "allocator" else keeps[:1],
            named,
            draws,
            draws[0].fit,
        )
        for name, (each, starts) in learned.items()
    }

    def of(number: int, draw: Draw) -> dict[str, dict[str, Any]]:
        test = table.rows(draw.test)
        static = _best_static(config, table.rows(draw.calibrate), fit)
        oracle = cheapest_choices(test.scores, test.budgets, float(test.full.mean()))
        found = {name: each[number] for name, each in certified.items()}
        for name in (SEARCHED, *AT_DEFAULTS):
            found[name]["beaten"] = float(found["allocator"]["budget"] < found[name]["budget"])
        return {
            **found,
            "best_static": _card(workspace, np.full(len(test.prompts), static), test),
            "oracle": _card(workspace, oracle, test),
        }

    return [of(number, draw) for number, draw in enumerate(draws)]


def _best(config: Config, fit: Table, sets: list[list[str]]) -> Settings:
    """Of the controller of least regret, the settings that the stage `tune` would take."""
    tuning = config.tuning.model_copy(update={"feature_sets": sets, "given": {}})
    work = Work.of(fit, config.calibration.alpha, tuning)
    return min((settings_for(name, work) for name in tuning.controllers), key=work.judge)


def _learned(config: Config, settings: Settings, fit: Table, features: Features) -> tuple[FittedPredictor, list[int]]:
    """What a controller learned, and for each value of `calibration.keep` the place of the price tested first."""
    starts = first_tested(out_of_fold(settings, features, fit), fit, config.calibration.keep)
    return learn(settings, features, fit.losses, fit.budgets), starts


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
    workspace: Workspace,
    learned: FittedPredictor,
    starts: list[int],
    keeps: list[float],
    table: Table,
    draws: list[Draw],
    fit: Rows,
) -> list[dict[str, Any]]:
    """Of one controller, certified on each draw's prompts at some levels: measured at the first on its test prompts,
    and whether the population breaks the bound, for any of them and for each (`broken_KEEP`, `budget_KEEP`). As in a
    run, one plan for all is tested on the prompts that were learned from (`one_plan`)."""
    calibration, expected = workspace.config.calibration, learned.predict(table.features)
    chosen, plans = choices(expected, table.rule), [plan_for_all(table.rows(fit), calibration, keep) for keep in keeps]

    def of(draw: Draw) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for keep, start, plan in zip(keeps, starts, plans, strict=False):
            price = price_on(draw.calibrate, chosen, table, calibration, keep, start)
            rule = rule_at(table.rule, expected[draw.calibrate], price, plan)
            is_valid = price is not None or rule.plan is not None
            served, whole = (
                _card(workspace, rule.choose(expected[rows], price), table.rows(rows))
                for rows in (draw.test, draw.population)
            )
            if not found:
                found = {**served, "certified": float(is_valid), "one_plan": float(rule.plan is not None)}
            found[f"broken_{keep:g}"] = float(is_valid and whole["loss"] > 1 - keep)
            found[f"budget_{keep:g}"] = served["budget"]
        return {**found, "broken": max(found[f"broken_{keep:g}"] for keep in keeps)}

    return [of(draw) for draw in draws]


def price_on(
    seen: Rows, chosen: Rows, table: Table, calibration: CalibrationSection, keep: float, start: int = 0
) -> float | None:
    """The price that is valid on drawn prompts [n], by the same test as a run's certificate.

    A prompt that was drawn twice is two independent draws of the population, so no prompts are grouped.

    Args:
        seen: rows of the table that were drawn.
        chosen: plans that each price chooses for all its prompts [T, N].
        table: N prompts, labelled in full.
        calibration: the confidence and the risk.
        keep: the bound.
        start: see `pipelines.stages.calibrate.first_tested`.
    """
    drawn = chosen[:, seen]
    return valid_price(
        PricePath(table.losses[seen, drawn], (drawn < len(table.budgets) - 1).any(axis=1)),
        alpha_of(keep),
        calibration.delta_of_one,
        table.tasks[seen] if calibration.per_task else None,
        risk=calibration.risk,
        full=table.full[seen],
        start=start,
    )


def _best_static(config: Config, seen: Table, fit: Table) -> int:
    """As `pipelines.stages.evaluate.best_static`, of prompts that are all independent draws."""
    calibration = config.calibration
    return cheapest_valid_plan(
        seen.losses,
        calibration.alpha,
        calibration.delta_of_one,
        calibration.risk,
        expected=fit.losses.mean(axis=0),
        tasks=seen.tasks if calibration.per_task else None,
        full=seen.full,
    )


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
