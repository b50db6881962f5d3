"""Stage 4: the settings of each controller, searched with Optuna on the tune split."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import optuna
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
from sqlalchemy.exc import SQLAlchemyError

from controller.base import controller_class
from controller.features import Projection
from controller.report_card import budget_at_losses
from pipelines.config import Config, ConfigError
from pipelines.progress import progress
from pipelines.stages import BY_NAME, stage_key, write_atomically
from pipelines.train import fitted
from pipelines.workspace import Table, Workspace


def run(config: Config) -> Path:
    """Search each controller; writes `tuning.json` with the best settings of each and which controller is best.

    The objective is the mean budget on the tune split at which a threshold loses at most half, once and one and a half
    times `calibration.alpha` of the prompts: what calibration will ask for, smoothed. Lower is better.
    """
    workspace = Workspace.of(config)
    train, tune = workspace.table("train"), workspace.table("tune")
    projection = Projection.fit(train.features, config.features.components)
    studies = {name: _study(config, name) for name in config.tuning.controllers}
    left = {name: config.tuning.trials - len(_finished(study)) for name, study in studies.items()}
    with progress("trials", sum(max(0, n) for n in left.values())) as advance:
        for name, study in studies.items():
            if left[name] > 0:
                objective = _objective(name, projection, train, tune, config.calibration.alpha)
                study.optimize(objective, n_trials=left[name], callbacks=[lambda study, trial: advance(1)])
    found = {name: {"parameters": s.best_params, "budget": s.best_value} for name, s in studies.items()}
    best = min(studies, key=lambda name: studies[name].best_value)
    text = json.dumps({"controllers": found, "best": best}, indent=2) + "\n"
    write_atomically(workspace.path("tuning.json"), text)
    return workspace.path("tuning.json")


def _objective(
    name: str, projection: Projection, train: Table, tune: Table, alpha: float
) -> Callable[[optuna.Trial], float]:
    features = projection(tune.features)

    def objective(trial: optuna.Trial) -> float:
        controller = fitted(name, controller_class(name).suggest(trial), projection, train)
        losses = (alpha / 2, alpha, 1.5 * alpha)
        return budget_at_losses(controller.predict(features), tune.sufficient, tune.budgets, losses)

    return objective


def _study(config: Config, name: str) -> optuna.Study:
    """The study of this controller on exactly these inputs: resumed where it stopped, new where the inputs changed."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    url = config.tuning.storage or f"sqlite:///{config.folder / 'tuning.db'}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        retry = RetryHeartbeatStaleTrialCallback(max_retry=3)
        try:
            storage = RDBStorage(url, heartbeat_interval=10, grace_period=60, heartbeat_stale_trial_callback=retry)
        except (SQLAlchemyError, ImportError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ConfigError(f"cannot use tuning.storage {url!r}: {reason}") from error
    return optuna.create_study(
        study_name=f"{config.name}-{name}-{_space_key(config)}",
        storage=storage,
        sampler=optuna.samplers.TPESampler(seed=0),
        load_if_exists=True,
    )


def _space_key(config: Config) -> str:
    """As the stage's key, but more trials of the same search go on with the same study."""
    same = config.model_copy(update={"tuning": config.tuning.model_copy(update={"trials": 1, "storage": None})})
    return stage_key(same, BY_NAME["tune"])


def _finished(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    return study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
