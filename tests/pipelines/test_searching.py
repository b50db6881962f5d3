"""The search of a controller's settings: resumed, in several processes, with one of them killed."""

import multiprocessing
import os
import threading
import time
from dataclasses import replace

import numpy as np
import optuna
import pytest
from redraws import searched, settings_for

from backbone.errors import InputError
from controller.base import ChoiceRule, LearningError
from controller.learning import Settings
from pipelines.config.learning_sections import TuningSection
from pipelines.stages.settings_search import (
    Search,
    Work,
    default_settings,
    finished,
    open_study,
    search,
    settings_of,
    settled,
)


def some_work(**tuning) -> Work:
    """80 prompts whose length decides what the shortened plan loses."""
    length = np.random.default_rng(0).normal(size=(80, 1)).astype(np.float32)
    losses = np.column_stack([np.clip(0.5 - length[:, 0], 0, 1), np.zeros(80)])
    section = {"trials": 4, "feature_sets": [["length"]], "components": [3], "folds": 2, **tuning}
    rule = ChoiceRule(np.array([0.5, 1.0]), "score_lost")
    return Work({"length": length}, losses, rule, (0.1,), TuningSection(**section))


@pytest.fixture
def wanted(tmp_path) -> Search:
    return Search(f"sqlite:///{tmp_path / 'tuning.db'}", "study", "logistic")


def test_search_begins_with_defaults_and_resumes(wanted) -> None:
    advanced: list[int] = []
    study = search(wanted, some_work(), advanced.append)
    first = [trial.params for trial in study.trials]
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 4
    assert study.trials[0].params == {"features": "length", "components": 3, "l2": 0.03}
    assert sum(advanced) == 4
    again = search(wanted, some_work(), advanced.append)
    assert len(again.trials) == 4
    more = search(wanted, some_work(trials=6), advanced.append)
    assert len(more.trials) == 6
    assert [trial.params for trial in more.trials[:4]] == first


def test_a_finished_trial_gives_its_settings_back(wanted) -> None:
    work = some_work()
    trial = search(wanted, work, lambda done: None).trials[2]
    settings = settings_of("logistic", trial, work.tuning)
    assert (settings.sets, settings.components) == (("length",), 3)
    assert settings.parameters == {"l2": trial.params["l2"]}
    assert work.judge(settings) == pytest.approx(trial.value)


def test_the_length_is_worth_more_than_noise() -> None:
    work, settings = some_work(), Settings("logistic", ("length",), 3)
    shuffled = {"length": np.random.default_rng(1).permutation(work.features["length"])}
    blind = Work(shuffled, work.losses, work.rule, work.bounds, work.tuning)
    assert work.judge(settings) < blind.judge(settings) - 0.1


def test_a_search_in_memory_tries_the_defaults_first(monkeypatch) -> None:
    work, tried = some_work(trials=3), []
    monkeypatch.setattr(Work, "judge", lambda self, settings: tried.append(settings) or -len(tried))
    best = searched("logistic", work)
    assert tried[0].parameters["l2"] == 0.03
    assert best == tried[2]
    assert len(tried) == 3


def test_trials_that_fall_behind_are_given_up(wanted, monkeypatch) -> None:
    seen: list[str] = []

    class Behind(optuna.pruners.BasePruner):
        def prune(self, study, trial) -> bool:
            seen.append(f"{trial.number}:{len(trial.intermediate_values)}")
            return trial.number == 2

    monkeypatch.setattr(optuna.pruners, "MedianPruner", lambda **_: Behind())
    study = search(wanted, some_work(), lambda done: None)
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "COMPLETE", "PRUNED", "COMPLETE"]
    assert "1:2" in seen
    assert "2:2" not in seen


@pytest.mark.parametrize("killed_at", [0, 1, 3])
def test_a_search_that_was_killed_ends_as_if_it_had_not_been(wanted, monkeypatch, killed_at) -> None:
    """The kill comes in the middle of a trial, whose settings are drawn."""
    undisturbed = search(replace(wanted, study="undisturbed"), some_work(trials=6), lambda done: None)
    judge, count = Work.judge, iter(range(100))

    def dying(self, settings, after_fold=None):
        if next(count) == killed_at:
            os._exit(9)
        return judge(self, settings, after_fold)

    child = os.fork()
    if not child:
        Work.judge = dying
        search(wanted, some_work(trials=6), lambda done: None)
    assert os.waitpid(child, 0)[1] >> 8 == 9
    states = [trial.state.name for trial in open_study(wanted, some_work().tuning).trials]
    assert states.count("RUNNING") == 1
    resumed = search(wanted, some_work(trials=6), lambda done: None)
    assert [t.params for t in finished(resumed)] == [t.params for t in finished(undisturbed)]
    assert [t.value for t in finished(resumed)] == [t.value for t in finished(undisturbed)]


def test_workers_share_a_search_and_a_kill_loses_no_trial(wanted) -> None:
    def kill_one() -> None:
        while not multiprocessing.active_children():
            time.sleep(0.05)
        multiprocessing.active_children()[0].kill()

    killer = threading.Thread(target=kill_one)
    killer.start()
    advanced: list[int] = []
    study = search(wanted, some_work(trials=8, workers=2), advanced.append)
    killer.join()
    assert len(finished(study)) >= 8
    assert sum(advanced) == len(finished(study))
    assert not multiprocessing.active_children()


def test_what_a_worker_finds_wrong_is_said_once(wanted) -> None:
    work = some_work(workers=2)
    work.features["length"][5] = np.nan
    with pytest.raises(InputError, match="prompts have features that are not finite"):
        search(wanted, work, lambda done: None)
    with pytest.raises(LearningError, match="features that are not finite"):
        search(wanted, Work(work.features, work.losses, work.rule, work.bounds, some_work().tuning), lambda done: None)


@pytest.mark.parametrize(
    ("saved", "taken"),
    [([0.01, -0.01, 0.02, -0.01, 0.0, 0.01], False), ([0.01, 0.02, 0.01, 0.02, 0.02, 0.01], True), ([0.0] * 6, False)],
)
def test_found_settings_must_clearly_beat_the_defaults(monkeypatch, saved, taken) -> None:
    """The regret that is stated is that of fresh folds, not the least of the search."""
    work, found = some_work(), Settings("logistic", ("length",), 3, {"l2": 0.5})
    default = default_settings("logistic", work.tuning)
    regrets = {default.parameters["l2"]: np.full(6, 0.1), 0.5: 0.1 - np.array(saved)}
    monkeypatch.setattr(Work, "regrets", lambda self, settings: regrets[settings.parameters["l2"]])
    settings, regret = settled(work, found)
    assert settings == (found if taken else default)
    assert regret == pytest.approx(regrets[settings.parameters["l2"]].mean())


def test_a_search_among_noise_keeps_the_defaults(monkeypatch) -> None:
    """All settings have a regret of .1 and are judged with noise: the least of 6 is found, and states too little."""
    random, work = np.random.default_rng(0), some_work(trials=6)
    monkeypatch.setattr(Work, "judge", lambda self, settings: random.normal(0.1, 0.01))
    monkeypatch.setattr(Work, "regrets", lambda self, settings: random.normal(0.1, 0.01, 6))
    default = default_settings("logistic", work.tuning)
    rows = [(searched("logistic", work),) for _ in range(30)]
    rows = [(found, *settled(work, found)) for (found,) in rows]
    assert sum(found != default for found, _, _ in rows) > 20
    assert sum(settings != default for _, settings, _ in rows) < 10
    assert np.mean([regret for _, _, regret in rows]) == pytest.approx(0.1, abs=0.004)


def test_few_prompts_are_not_searched(monkeypatch) -> None:
    def no_study(**_: object) -> None:
        raise AssertionError("a search")

    monkeypatch.setattr(optuna, "create_study", no_study)
    work = some_work(search_from=81)
    assert settings_for("logistic", work) == default_settings("logistic", work.tuning)
    with pytest.raises(AssertionError, match="a search"):
        settings_for("logistic", some_work(search_from=80))
