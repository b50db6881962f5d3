"""Stage 5: the settings of each controller, searched with Optuna on the prompts to train and to tune."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from backbone.files import write_atomically
from controller.learning import Settings
from pipelines.config import LONGEST_NAME, Config
from pipelines.config.learning_sections import GivenSettings
from pipelines.run.check import check_given_settings
from pipelines.run.progress import progress, say
from pipelines.run.state import stage_key
from pipelines.run.workspace import Workspace
from pipelines.stages.settings_search import Search, Work, default_settings, finished, search, settings_of, settled


def run(workspace: Workspace) -> Path:
    """Search each controller; writes `tuning.json` with the settings of each and which controller is best, and
    `winner.yaml`, a configuration that makes the same controller without a search.

    Below `tuning.search_from` prompts nothing is searched, and each controller has its default settings. The regret
    that is made small is `controller.report.report_card.regret` at half, once and one and a half times
    `calibration.keep`: around what calibration will ask for. The one that is stated is of fresh folds.
    """
    table, config, tuning = workspace.table("train", "tune"), workspace.config, workspace.config.tuning
    work = Work.of(table, config.calibration.alpha, tuning)
    url, key = tuning.storage or f"sqlite:///{workspace.path('tuning.db')}", _space_key(workspace)
    check_given_settings(tuning)
    if not work.is_searched:
        say(
            f"  {len(table.prompts)} prompts to train and to tune are fewer than tuning.search_from "
            f"({tuning.search_from}): default settings, no search"
        )
    found = {}
    for name in tuning.controllers:
        if (given := tuning.given.get(name)) is not None:
            found[name] = _unsearched(work, Settings.from_dict({"name": name, **given.model_dump()}))
        elif work.is_searched:
            found[name] = _searched(Search(url, f"{config.name}-{name}-{key}", name), work)
        else:
            found[name] = _unsearched(work, default_settings(name, tuning))
    best = min(found, key=lambda name: found[name]["regret"])
    _save_winner(config, found[best]["settings"])
    return workspace.write("tuning.json", {"controllers": found, "best": best})


def _searched(wanted: Search, work: Work) -> dict[str, Any]:
    """The settings that won, their regret on fresh folds, and how many trials they took."""
    with progress(f"trials of {wanted.controller}", work.tuning.trials) as advance:
        study = search(wanted, work, advance)
    try:
        best = study.best_trial
    except ValueError as error:
        raise wanted.damaged(error) from None
    settings, regret = settled(work, settings_of(wanted.controller, best, work.tuning))
    return {"settings": settings.to_dict(), "regret": regret, "trials": len(finished(study))}


def _unsearched(work: Work, settings: Settings) -> dict[str, Any]:
    regret = float(work.regrets(settings).mean())
    return {"settings": settings.to_dict(), "regret": regret, "trials": 0}


def _save_winner(config: Config, settings: dict[str, Any]) -> None:
    name = settings["name"]
    given = {name: GivenSettings(**{key: value for key, value in settings.items() if key != "name"})}
    tuning = config.tuning.model_copy(update={"controllers": [name], "given": given, "storage": None})
    winner = config.model_copy(update={"tuning": tuning, "name": f"{config.name[: LONGEST_NAME - 7]}-winner"})
    text = "# The best controller of this run, to be made again without a search: layerbudget run winner.yaml\n"
    write_atomically(config.folder / "winner.yaml", text + winner.dump())


def _space_key(workspace: Workspace) -> str:
    """As the stage's key, but more trials or workers of the same search go on with the same study."""
    config = workspace.config
    same = config.tuning.model_copy(update={"trials": 1, "workers": 1, "storage": None, "given": {}, "search_from": 0})
    return stage_key(Workspace(config.model_copy(update={"tuning": same})), "tune")
