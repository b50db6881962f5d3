"""Stage 5: the settings of each controller, searched with Optuna on the prompts to train and to tune."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import optuna

from backbone.files import write_atomically
from controller.learning import Settings
from pipelines.check import check_given_settings
from pipelines.config import LONGEST_NAME, Config, ConfigError
from pipelines.learning_sections import GivenSettings
from pipelines.progress import progress
from pipelines.run_state import stage_key
from pipelines.settings_search import Search, Work, finished, regret_bounds, search, settings_of
from pipelines.workspace import Workspace


def run(config: Config) -> Path:
    """Search each controller; writes `tuning.json` with the best settings of each and which controller is best, and
    `winner.yaml`, a configuration that makes the same controller without a search.

    The regret that is made small is `controller.report.report_card.regret` at half, once and one and a half times
    `calibration.alpha`: around what calibration will ask for.
    """
    workspace = Workspace.of(config)
    table = workspace.table("train", "tune")
    tuning = config.tuning
    work = Work(table.features, table.kept, table.budgets, regret_bounds(config, table), tuning)
    url, key = tuning.storage or f"sqlite:///{config.folder / 'tuning.db'}", _space_key(config)
    found = {
        name: _given(work, name)
        if name in tuning.given
        else _searched(Search(url, f"{config.name}-{name}-{key}", name), work)
        for name in tuning.controllers
    }
    best = min(found, key=lambda name: found[name]["regret"])
    write_atomically(workspace.path("tuning.json"), json.dumps({"controllers": found, "best": best}, indent=2) + "\n")
    _save_winner(config, found[best]["settings"])
    return workspace.path("tuning.json")


def _searched(wanted: Search, work: Work) -> dict[str, Any]:
    """The settings that won, what they cost, and how much each setting mattered."""
    with progress(f"trials of {wanted.controller}", work.tuning.trials) as advance:
        study = search(wanted, work, advance)
    try:
        best = study.best_trial
    except ValueError as error:
        raise ConfigError(
            f"tuning.storage {wanted.url!r} is damaged ({error}): delete it, and the search begins again"
        ) from None
    return {
        "settings": settings_of(wanted.controller, best, work.tuning).to_dict(),
        "regret": best.value,
        "trials": len(finished(study)),
        "importance": _importance(study),
    }


def _given(work: Work, name: str) -> dict[str, Any]:
    check_given_settings(work.tuning)
    settings = Settings.from_dict({"name": name, **work.tuning.given[name].model_dump()})
    return {"settings": settings.to_dict(), "regret": work.judge(settings), "trials": 0, "importance": {}}


def _importance(study: optuna.Study) -> dict[str, float]:
    """Share of the variance of the regret that each setting explains; empty for too few trials.

    Source: PED-ANOVA, Watanabe et al. 2023 (arXiv 2304.10255).
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that low regret is meant, and that few trials say little
            found = optuna.importance.get_param_importances(study)
    except (RuntimeError, ValueError):  # fewer than two trials, or all of equal regret
        return {}
    return {name: round(float(value), 4) for name, value in found.items()}


def _save_winner(config: Config, settings: dict[str, Any]) -> None:
    name = settings["name"]
    given = {name: GivenSettings(**{key: value for key, value in settings.items() if key != "name"})}
    tuning = config.tuning.model_copy(update={"controllers": [name], "given": given, "storage": None})
    winner = config.model_copy(update={"tuning": tuning, "name": f"{config.name[: LONGEST_NAME - 7]}-winner"})
    text = "# The best controller of this run, to be made again without a search: layerbudget run winner.yaml\n"
    write_atomically(config.folder / "winner.yaml", text + winner.dump())


def _space_key(config: Config) -> str:
    """As the stage's key, but more trials or workers of the same search go on with the same study."""
    same = config.tuning.model_copy(update={"trials": 1, "workers": 1, "storage": None, "given": {}})
    return stage_key(config.model_copy(update={"tuning": same}), "tune")
