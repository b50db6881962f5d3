"""How settings of a controller are judged: by regret out of fold, and found ones beside the defaults."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import optuna
from numpy.typing import NDArray

from controller.base import CONTROLLERS
from controller.features import Features
from controller.learning import CrossFit, Settings
from controller.report.report_card import regret
from pipelines.config import Config
from pipelines.config.learning_sections import TuningSection
from pipelines.evaluation.learning_table import Table

LEAST_AROUND = 0.005
"""How far from the bound the others lie at least, in its unit."""
REPEATS = 3
"""Cross-fits, each on folds that no trial has seen, in which settings are judged once more."""


@dataclass(frozen=True)
class Work:
    """What settings are tried on.

    Attributes:
        features: of N prompts.
        kept: share of quality that each plan keeps [N, K].
        budgets: of the plans [K].
        bounds: mean losses at which the regret counts, in the unit of `controller.base.lost`.
        tuning: how to search.
    """

    features: Features
    kept: NDArray[np.float64]
    budgets: NDArray[np.float64]
    bounds: Sequence[float]
    tuning: TuningSection

    @cached_property
    def _cross_fits(self) -> list[CrossFit]:
        """The one of the trials, then `REPEATS` others."""
        most, folds = max(self.tuning.components), self.tuning.folds
        return [CrossFit(self.features, self.kept, self.budgets, folds, most, seed) for seed in range(REPEATS + 1)]

    @property
    def is_searched(self) -> bool:
        """Whether there are enough prompts for a search."""
        return len(self.kept) >= self.tuning.search_from

    def regrets(self, settings: Settings) -> NDArray[np.float64]:
        """Regret on each held-out fold of the repeated cross-fits [REPEATS * folds]."""
        found = []
        for cross_fit in self._cross_fits[1:]:
            before = 0
            for predicted, rows in cross_fit.predict(settings):
                held, before = rows[before:], len(rows)
                found.append(regret(predicted[held], self.kept[held], self.budgets, self.bounds))
        return np.array(found)

    def judge(self, settings: Settings, after_fold: Callable[[int, float], None] | None = None) -> float:
        """Regret of out-of-fold predictions; `after_fold` is told the regret so far."""
        for fold, (predicted, rows) in enumerate(self._cross_fits[0].predict(settings), 1):
            if after_fold or fold == self.tuning.folds:
                found = regret(predicted[rows], self.kept[rows], self.budgets, self.bounds)
            if after_fold:
                after_fold(fold, found)
        return found


def regret_bounds(config: Config, table: Table) -> tuple[float, ...]:
    """The mean losses at which regret counts: around what calibration will ask for."""
    alpha = config.calibration.alpha
    around = max(abs(alpha) / 2, LEAST_AROUND)
    return tuple(bound * table.unit for bound in (alpha - around, alpha, alpha + around))


def settings_of(name: str, trial: Any, tuning: TuningSection) -> Settings:
    """The settings that a trial stands for; also of a finished one."""
    asked = optuna.trial.FixedTrial(trial.params) if isinstance(trial, optuna.trial.FrozenTrial) else trial
    sets = ["+".join(names) for names in tuning.feature_sets]
    chosen = asked.suggest_categorical("features", sets)
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
