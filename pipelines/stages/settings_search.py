"""One controller's settings, tried by one process or by several at once; a killed one loses no trial."""

from __future__ import annotations

import multiprocessing
import random
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import optuna
import torch
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.study import MaxTrialsCallback
from optuna.trial import TrialState
from sqlalchemy.exc import SQLAlchemyError

from backbone.errors import InputError, reason_of
from backbone.interrupts import deaf_children
from pipelines.config import ConfigError
from pipelines.config.learning_sections import TuningSection
from pipelines.stages.settings_regret import Work, first_trial, settings_of

HEARTBEAT_S, GRACE_S = 10, 60
"""A trial whose worker was killed is tried again by another one after GRACE_S without a sign of life."""

ENDED = (TrialState.COMPLETE, TrialState.PRUNED)


@dataclass(frozen=True, slots=True)
class Search:
    """Where the trials of one controller are kept: the storage's URL and the study's name."""

    url: str
    study: str
    controller: str


def open_study(wanted: Search, tuning: TuningSection, seed: int = 0) -> optuna.Study:
    """The study of a search, as far as it came.

    Raises:
        ConfigError: the storage cannot be used.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        retry = RetryHeartbeatStaleTrialCallback(max_retry=3)
        try:
            storage = RDBStorage(
                wanted.url,
                heartbeat_interval=HEARTBEAT_S,
                grace_period=GRACE_S,
                heartbeat_stale_trial_callback=retry,
            )
        except (SQLAlchemyError, ImportError) as error:
            reason = reason_of(error)
            raise ConfigError(f"cannot use tuning.storage {wanted.url!r}: {reason}") from error
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
        raise ConfigError(
            f"tuning.storage {wanted.url!r} is damaged ({error}): delete it, and the search begins again"
        ) from None
    return study


def search(wanted: Search, work: Work, advance: Callable[[int], None]) -> optuna.Study:
    """Try settings until the study has `tuning.trials` finished trials; one already there is not tried again.

    A search by one worker that was killed goes on as if it had not been: the trial it was at is tried again, and what
    is drawn for a trial depends on the finished ones alone.
    """
    study = open_study(wanted, work.tuning)
    if work.tuning.workers == 1:
        _give_up_running(study)
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


def _give_up_running(study: optuna.Study) -> None:
    """Nobody else is at work here, so that a trial said to be running was left by a process that was killed."""
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study.tell(trial.number, state=TrialState.FAIL)


def sampler(seed: int) -> optuna.samplers.TPESampler:
    """What draws the settings of the next trial."""
    return optuna.samplers.TPESampler(seed=seed)


def finished(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    return study.get_trials(deepcopy=False, states=ENDED)


def _try(wanted: Search, work: Work, seed: int, *callbacks: Callable[..., None]) -> None:
    """Finish trials in this process until there are enough."""
    study = open_study(wanted, work.tuning, seed)
    enough = MaxTrialsCallback(work.tuning.trials, states=ENDED)
    study.optimize(partial(_objective, wanted.controller, work), callbacks=[enough, *callbacks])


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
    torch.set_num_threads(1)
    try:
        _try(wanted, work, seed)
    except InputError as error:
        errors.put(str(error))
