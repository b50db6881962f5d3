"""The sections of a configuration about what is learned, certified and measured: every key with its default."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from controller.base import CONTROLLERS, check_sets
from controller.certificate.certificate import MOST_LEVELS, PLAN_SHARE, alpha_of
from controller.certificate.risks import MOST_KEPT, Risk
from pipelines.config.sections import Section, Text

Level = Annotated[float, Field(gt=0, lt=MOST_KEPT)]


class GivenSettings(Section):
    """What is to be known to fit one controller; see `controller.learning.Settings`."""

    sets: list[str] = Field(min_length=1)
    components: int = Field(ge=1)
    parameters: dict[str, Any] = Field(default_factory=dict)


class TuningSection(Section):
    controllers: list[Annotated[Text, AfterValidator(CONTROLLERS.checked)]] = Field(["lightgbm", "mlp"], min_length=1)
    """Controllers to train: `lightgbm`, `mlp`, `logistic`, or one of your own. The best one is saved."""
    search_from: int = Field(500, ge=0)
    """Prompts in `train` and `tune` from which on settings are searched. With fewer the defaults are taken, since a
    search among so few finds noise (docs/controllers.md)."""
    trials: int = Field(20, ge=1)
    """Finished trials per controller, for the least regret; the first tries the defaults, and trials that fall behind
    after some folds are pruned. What is found must beat the defaults by more than a standard error."""
    feature_sets: list[list[str]] = Field(
        [["length", "path", "states"], ["length", "tokens", "path", "states"], ["length", "path", "states", "windows"]],
        min_length=1,
    )
    """Combinations of feature sets to choose from."""
    components: list[Annotated[int, Field(ge=1)]] = Field([12, 24, 48, 96], min_length=1)
    """Numbers of principal components of the wide sets to choose from."""
    folds: int = Field(4, ge=2, le=50)
    """Folds of the cross-validation on `train` and `tune` that scores a trial."""
    workers: int = Field(1, ge=1)
    """Processes that try settings at the same time."""
    given: dict[str, GivenSettings] = Field(default_factory=dict)
    """Settings of controllers that are not searched, as in a run's tuning.json."""
    storage: Text | None = None
    """Optuna's storage URL; default: tuning.db in the run folder."""

    @model_validator(mode="after")
    def _check_names(self) -> TuningSection:
        for sets in [*self.feature_sets, *(given.sets for given in self.given.values())]:
            check_sets(sets)
        if not all(self.feature_sets):
            raise ValueError(f"feature_sets must not hold an empty set, got {self.feature_sets}")
        if len(set(self.controllers)) < len(self.controllers):
            raise ValueError(f"controllers names one twice, got {self.controllers}")
        if unknown := set(self.given) - set(self.controllers):
            raise ValueError(f"given holds settings of {min(unknown)!r}, which is not among tuning.controllers")
        return self


class CalibrationSection(Section):
    risk: Risk = "mean_score"
    """What is bounded (docs/controllers.md): how far the mean score falls below the full model's, where wins offset
    losses (`mean_score`); the mean score that answers lose (`score_lost`); or the share of answers that are not
    sufficient by `label.tolerance` (`insufficient`)."""
    keep: Annotated[list[Level], BeforeValidator(lambda given: given if isinstance(given, list) else [given])] = Field(
        [0.9], min_length=1, max_length=MOST_LEVELS
    )
    """The bound, or several. For `mean_score` the least share of the full model's mean score, which may be 1 or more
    where heads or bridges win; else 1 less the largest mean loss. Several values share `delta`. Each is certified,
    saved and compared, and the allocator runs at the first."""
    delta: float = Field(0.1, gt=0, lt=1)
    """Largest probability that a certified bound does not hold."""
    per_task: bool = False
    """Bound the loss of every task instead of their mean."""
    outliers: float = Field(0.05, ge=0, lt=1)
    """Share of prompts like the calibration prompts that the outlier test may send to the full plan; 0 for no such
    test."""
    false_alarms: float = Field(0.01, gt=0, lt=1)
    """Largest probability that the drift alarm is ever triggered although prompts are like the calibration prompts."""

    @model_validator(mode="after")
    def _check_keep(self) -> CalibrationSection:
        if self.risk != "mean_score" and max(self.keep) >= 1:
            raise ValueError(
                f"keep must be below 1 for the risk {self.risk!r}, whose losses are never won, got {self.keep}"
            )
        if len(set(self.keep)) < len(self.keep):
            raise ValueError(f"keep names a value twice, got {self.keep}")
        return self

    @property
    def alpha(self) -> float:
        """The mean loss of the first value of `keep`."""
        return alpha_of(self.keep[0])

    @property
    def delta_of_one(self) -> float:
        """The share of `delta` that the price of each value of `keep` has."""
        return (1 - PLAN_SHARE) * self.delta / len(self.keep)


class EvaluationSection(Section):
    speed_prompts: int = Field(8, ge=1)
    """Test prompts for speed measurements, as one batch and one at a time."""
    speed_tokens: int = Field(16, ge=2)
    """New tokens per prompt in speed measurements."""
    speed_rounds: int = Field(20, ge=1)
    """Timing rounds after a warm-up, at most; fewer once the figures are exact."""
    speed_seconds: float = Field(60.0, gt=0)
    """Seconds after which no round begins, once there are five."""
