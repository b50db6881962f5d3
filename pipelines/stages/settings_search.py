"""One controller's settings: judged by regret out of fold, tried by one process or by several at once.

A killed process loses no trial.
"""

from __future__ import annotations

import multiprocessing
import random
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import optuna
import torch
from numpy.typing import NDArray
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.study import MaxTrialsCallback
from optuna.trial import TrialState
from sqlalchemy.exc import SQLAlchemyError

from backbone.errors import InputError, reason_of
from backbone.interrupts import deaf_children
from controller.base import CONTROLLERS, ChoiceRule
from controller.features import Features
from controller.learning import CrossFit, Settings
from controller.report.report_card import regret
from pipelines.config import ConfigError
from pipelines.config.learning_sections import TuningSection
from pipelines.evaluation.learning_table import Table

LEAST_AROUND = 0.005
"""How far from the bound the others lie at least, in its unit."""
REPEATS = 3
"""Cross-fits, each on folds that no trial has seen, in which settings are judged once more."""
HEARTBEAT_S, GRACE_S = 10, 60
"""A trial whose worker was killed is tried again by another one after GRACE_S without a sign of life."""
ENDED = (TrialState.COMPLETE, TrialState.PRUNED)


@dataclass(frozen=True)
class Work:
    """What settings are tried on.

    Attributes:
        features: of N prompts.
        losses: of each plan [N, K].
        rule: how plans are chosen.
        bounds: mean losses at which the regret counts.
        tuning: how to search.
    """

    features: Features
    losses: NDArray[np.float64]
    rule: ChoiceRule
    bounds: Sequence[float]
    tuning: TuningSection

    @classmethod
    def of(cls, table: Table, alpha: float, tuning: TuningSection) -> Work:
        """Settings are judged around the mean loss that calibration will ask for, `alpha`."""
        around = max(abs(alpha) / 2, LEAST_AROUND)
        bounds = [bound * table.unit for bound in (alpha - around, alpha, alpha + around)]
        return cls(table.features, table.losses, table.rule, bounds, tuning)

    @cached_property
    def _cross_fits(self) -> list[CrossFit]:
        """The one of the trials, then `REPEATS` others."""
        most, folds = max(self.tuning.components), self.tuning.folds
        known = self.features, self.losses, self.rule.budgets
        return [CrossFit(*known, folds, most, seed) for seed in range(REPEATS + 1)]

    @property
    def is_searched(self) -> bool:
        """Whether there are enough prompts for a search."""
        return len(self.losses) >= self.tuning.search_from

    def regrets(self, settings: Settings) -> NDArray[np.float64]:
        """Regret on each held-out fold of the repeated cross-fits [REPEATS * folds]."""
        found = []
        for cross_fit in self._cross_fits[1:]:
            before = 0
            for predicted, rows in cross_fit.predict(settings):
                held, before = rows[before:], len(rows)
                found.append(regret(predicted[held], self.losses[held], self.rule, self.bounds))
        return np.array(found)

    def judge(self, settings: Settings, after_fold: Callable[[int, float], None] | None = None) -> float:
        """Regret of out-of-fold predictions; `after_fold` is told the regret so far."""
        for fold, (predicted, rows) in enumerate(self._cross_fits[0].predict(settings), 1):
            if after_fold or fold == self.tuning.folds:
                found = regret(predicted[rows], self.losses[rows], self.rule, self.bounds)
            if after_fold:
                after_fold(fold, found)
        return found


def settings_of(name: str, trial: Any, tuning: TuningSection) -> Settings:
    """The settings that a trial stands for; also of a finished one."""
    asked = optuna.trial.FixedTrial(trial.params) if isinstance(trial, optuna.trial.FrozenTrial) else trial
    chosen = asked.suggest_categorical("features", ["+".join(names) for names in tuning.feature_sets])
    components = asked.suggest_categorical("components", tuning.components)
    return Settings(name, tuple(chosen.split("+")), components, CONTROLLERS[name].suggest(asked))


def first_trial(name: str, tuning: TuningSection) -> dict[str, Any]:
    """What the first trial tries."""
    middle = tuning.components[len(tuning.components) // 2]
    return {"features": "+".join(tuning.feature_sets[0]), "components": middle, **CONTROLLERS[name].defaults()}


def default_settings(name: str, tuning: TuningSection) -> Settings:
    """The settings that the first trial tries."""
    return settings_of(name, optuna.trial.FixedTrial(first_trial(name, tuning)), tuning)


def settled(work: Work, found: Settings) -> tuple[Settings, float]:
    """The settings that a search found, or the defaults unless they are clearly worse, with the mean regret.

    The least regret of many trials is a minimum over noise: it understates the regret, and often belongs to settings
    that are no better. So both are judged on fresh folds, and the defaults stay unless their regret is higher by more
    than one standard error of the difference.

    Source: the one-standard-error rule of Breiman et al. 1984, Classification and Regression Trees, section 3.4.3. The
    repeats share their prompts, so the error is that of the folds of one of them.
    """
    plain = default_settings(found.name, work.tuning)
    regrets = work.regrets(plain)
    if found == plain:
        return plain, float(regrets.mean())
    others = work.regrets(found)
    saved = regrets - others
    is_clear = saved.mean() > saved.std(ddof=1) / np.sqrt(work.tuning.folds)
    return (found, float(others.mean())) if is_clear else (plain, float(regrets.mean()))


@dataclass(frozen=True, slots=True)
class Search:
    """Where the trials of one controller are kept: the storage's URL and the study's name."""

    url: str
    study: str
    controller: str

    def damaged(self, error: Exception) -> ConfigError:
        return ConfigError(f"tuning.storage {self.url!r} is damaged ({error}): delete it, and the search begins again")


def open_study(wanted: Search, tuning: TuningSection, seed: int = 0) -> optuna.Study:
    """The study of a search, with the trials that it has.

    Raises:
        ConfigError: the storage cannot be used.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        try:
            storage = RDBStorage(
                wanted.url,
                heartbeat_interval=HEARTBEAT_S,
                grace_period=GRACE_S,
                heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(max_retry=3),
            )
        except (SQLAlchemyError, ImportError) as error:
            raise ConfigError(f"cannot use tuning.storage {wanted.url!r}: {reason_of(error)}") from error
    try:
        study = optuna.create_study(
            study_name=wanted.study,
            storage=storage,
            sampler=sampler(seed),
            pruner=optuna.pruners.MedianPruner(n_startup_trials=8, n_warmup_steps=1),
            direction="minimize",
            load_if_exists=True,
        )
        if study.metric_names is None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                study.set_metric_names(["regret"])  # what a dashboard writes beside the values
    except (KeyError, ValueError) as error:
        raise wanted.damaged(error) from None
    return study


def sampler(seed: int) -> optuna.samplers.TPESampler:
    """What draws the settings of the next trial."""
    return optuna.samplers.TPESampler(seed=seed)


def finished(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    return study.get_trials(deepcopy=False, states=ENDED)


def search(wanted: Search, work: Work, advance: Callable[[int], None]) -> optuna.Study:
    """Try settings until the study has `tuning.trials` finished trials; one already there is not tried again.

    A search by one worker that was killed resumes with the same result: the unfinished trial is tried again, and what
    is drawn for a trial depends on the finished ones alone.
    """
    study = open_study(wanted, work.tuning)
    if work.tuning.workers == 1:  # a trial said to be running was left by a process that was killed
        for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            study.tell(trial.number, state=TrialState.FAIL)
    if not finished(study) and not study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
        study.enqueue_trial(first_trial(wanted.controller, work.tuning))
    while (left := work.tuning.trials - len(finished(study))) > 0:
        if work.tuning.workers == 1:
            study.sampler = sampler(len(finished(study)))
            study.optimize(partial(_objective, wanted.controller, work), n_trials=1)
            advance(1)
        else:
            _try_in_processes(wanted, work, min(work.tuning.workers, left), study, advance)
    return study


def _objective(name: str, work: Work, trial: optuna.Trial) -> float:
    def after_fold(fold: int, regret_so_far: float) -> None:
        trial.report(regret_so_far, fold)
        if trial.should_prune():
            raise optuna.TrialPruned

    return work.judge(settings_of(name, trial, work.tuning), after_fold)


def _try_in_processes(
    wanted: Search, work: Work, workers: int, study: optuna.Study, advance: Callable[[int], None]
) -> None:
    """The same in several processes. One that is killed leaves its trial to the others, which try it again once it has
    given no sign of life for `GRACE_S`.

    Raises:
        InputError: what a worker found wrong.
    """
    context, done = multiprocessing.get_context("spawn"), len(finished(study))
    errors = context.SimpleQueue()
    started = random.randrange(2**31)
    processes = [
        context.Process(target=_worker, args=(wanted, work, started + number, errors), daemon=True)
        for number in range(workers)
    ]
    try:
        with deaf_children():
            for process in processes:
                process.start()
        working = True
        while working:
            time.sleep(0.2)
            working = any(process.is_alive() for process in processes)  # before counting, so that the last is counted
            now = len(finished(study))
            advance(now - done)
            done = now
    finally:
        for process in processes:
            if process.pid is not None:
                process.terminate()
    if not errors.empty():
        raise InputError(errors.get())
    if failed := [process.exitcode for process in processes if process.exitcode and process.exitcode > 0]:
        raise RuntimeError(f"a tuning worker failed with exit code {failed[0]}; its traceback is above")


def _worker(wanted: Search, work: Work, seed: int, errors: Any) -> None:
    """Finish trials in this process until there are enough."""
    torch.set_num_threads(1)
    try:
        study = open_study(wanted, work.tuning, seed)
        enough = MaxTrialsCallback(work.tuning.trials, states=ENDED)
        study.optimize(partial(_objective, wanted.controller, work), callbacks=[enough])
    except InputError as error:
        errors.put(str(error))
