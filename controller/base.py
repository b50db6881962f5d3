"""The contract of controllers, and the choice of plans from predictions.

A new controller takes three things: a subclass of `Controller`, a line that registers it (in `CONTROLLERS`, or in the
entry points of your own package), and a test class that inherits `controller.testing.ControllerConformance`.

Shapes: `N` prompts, `F` features, `K` plans, cheapest first; the last one is the full plan.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from backbone.errors import InputError
from backbone.registry import Registry
from controller.certificate.risks import Risk

if TYPE_CHECKING:
    from controller.certificate.outliers import OutlierTest
    from controller.features import Features, Projection

T = TypeVar("T")

Floats = NDArray[np.float32]

FEATURE_SETS = ("length", "tokens", "embedding", "states", "windows", "path", "lens")
"""Names of the sets of features; `controller.features` computes them."""
WIDE = ("embedding", "states", "windows")
"""Feature sets as wide as the hidden size; controllers see their principal components."""


class LearningError(InputError):
    """Features or losses that nothing can be learned from, or a damaged file of a controller."""


def check_sets(sets: Sequence[str]) -> None:
    """Raises LearningError for names that are not in `FEATURE_SETS`."""
    if unknown := [name for name in sets if name not in FEATURE_SETS]:
        raise LearningError(f"unknown features {unknown[0]!r}; known are {', '.join(FEATURE_SETS)}")


class Trial(Protocol):
    """The part of an Optuna trial that a search space needs."""

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float: ...
    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int: ...
    def suggest_categorical(self, name: str, choices: Any) -> Any: ...


class Controller(ABC):
    """Predicts the loss of each plan for each prompt.

    Losses lie in [-1, 1], see `controller.certificate.risks.plan_losses`. The full plan has the loss 0, and a plan that
    scores better than the full plan has a loss below 0.

    The tune and train stages call `fit` once. `predict` is called any number of times, also from several threads while
    serving. The prediction for a row does not depend on the other rows, and has the same bits after `save` and `load`.
    A controller keeps no reference to its arguments. Subclasses implement `_fit` and `_predict`, which are given finite
    numbers only.

    Attributes:
        FILES: names of the files that `save` writes and `load` reads, each `controller.*` (`controller.models.files`).
        loss_range: the losses that a model trained by cross-entropy can predict. None after `load` from the files of
            older versions, which do not hold it; the caller of `load` then sets it.
    """

    FILES: ClassVar[tuple[str, ...]]
    loss_range: LossRange | None = None

    def fit(self, features: Floats, losses: Floats, budgets: Floats) -> None:
        """Learn from N prompts.

        Args:
            features: projected features [N, F].
            losses: of each plan for each prompt, in [-1, 1], [N, K]; the last column is 0.
            budgets: share of the decoder that each plan runs [K], ascending, the last 1.

        Raises:
            LearningError: features that are not finite, losses outside [-1, 1], or a full plan with a loss.
        """
        if bad := int((~np.isfinite(features).all(axis=1)).sum()):
            raise LearningError(f"{bad} of {len(features)} prompts have features that are not finite; leave them out")
        if (outside := losses[~(np.abs(losses) <= 1)]).size:
            raise LearningError(f"a loss is {outside[0]:g}; losses must lie in [-1, 1]")
        if (full := losses[:, -1]).any():
            raise LearningError(f"the last plan has a loss of {full[full != 0][0]:g}; it is the full plan, with loss 0")
        self._fit(np.array(features, np.float32), np.array(losses, np.float32), np.array(budgets, np.float32))

    def predict(self, features: Floats) -> Floats:
        """Expected losses [N, K] for features [N, F]; 0 for the full plan.

        A row with a feature that is not finite has the losses NaN under all shortened plans, so it gets the full plan.

        Raises:
            LearningError: `_predict` returned a loss other than 0 for the full plan.
        """
        finite = np.asarray(np.isfinite(features).all(axis=1))
        losses = self._predict(np.where(finite[:, None], features, 0.0).astype(np.float32)).astype(np.float32)
        if (wrong := np.abs(losses[:, -1]) > 0.1).any():  # smaller ones are rounding
            raise LearningError(
                f"{type(self).__name__} predicts {losses[wrong, -1][0]:g} for the full plan, whose loss is 0; "
                "`_predict` must return losses, not quality"
            )
        losses[~finite] = np.nan
        losses[:, -1] = 0.0
        return losses

    @abstractmethod
    def _fit(self, features: Floats, losses: Floats, budgets: Floats) -> None:
        """See `fit`."""

    @abstractmethod
    def _predict(self, features: Floats) -> Floats:
        """See `predict`."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write `FILES` into an existing folder."""

    @classmethod
    @abstractmethod
    def load(cls, folder: Path) -> Controller:
        """Read the files of `save`; raises LearningError for damaged or foreign ones."""

    @staticmethod
    def suggest(trial: Trial) -> dict[str, Any]:
        """Draw constructor arguments from a trial of the tune stage; empty where nothing is tuned."""
        return {}

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """Defaults of the constructor arguments; they lie within the ranges of `suggest`."""
        arguments = inspect.signature(cls.__init__).parameters.values()
        return {argument.name: argument.default for argument in arguments if argument.default is not argument.empty}


def fitted(model: T | None) -> T:
    """The model of a controller; raises RuntimeError where there is none yet."""
    if model is None:
        raise RuntimeError("the controller is not fitted; call `fit` or `load` first")
    return model


@dataclass(frozen=True, slots=True)
class LossRange:
    """The range of losses that a model trained by cross-entropy can predict: from `least`, -1 or 0, to 1."""

    least: float

    @classmethod
    def of(cls, losses: Floats) -> LossRange:
        """From -1 if any plan scores better than the full plan on any prompt, otherwise from 0."""
        return cls(-1.0 if (losses < 0).any() else 0.0)

    def targets(self, losses: Floats) -> Floats:
        """Cross-entropy targets for losses of shortened plans: 1 for the loss `least`, 0 for the loss 1."""
        return np.ascontiguousarray((1.0 - losses) / (1.0 - self.least))

    def losses(self, predicted: NDArray[Any]) -> Floats:
        """Losses [N, K] for predicted targets of the shortened plans [N, K - 1]."""
        return np.column_stack([1.0 - (1.0 - self.least) * predicted, np.zeros(len(predicted))])


CAUTION = 1e-3
"""Added to each expected loss, for each unit of the price, where losses can be negative; see `ChoiceRule`."""


@dataclass(frozen=True, slots=True)
class ChoiceRule:
    """Choose the plan with the least budget + price x expected loss.

    This is the Lagrangian of "the least mean budget whose mean loss is at most alpha" (the multiple-choice knapsack of
    Glavas et al. 2024, arXiv 2410.20022, section 4, with predictions in place of scores). A tie goes to the plan with
    the smaller budget.

    Under `mean_score` losses can be negative, and a high price would follow every such prediction, noise included. So
    `CAUTION` times the price is added to the expected losses of shortened plans. The highest prices then choose the
    full plan for all prompts, and lower prices shorten more and more of them. So the sequence of tests in
    `controller.certificate.calibration`, from high to low prices, does not fail at its first step.

    Attributes:
        budgets: share of the decoder that each plan runs [K].
        risk: definition of the predicted loss.
        plan: place of the plan that all prompts run, whatever is expected; None where the price chooses.
    """

    budgets: NDArray[Any]
    risk: Risk
    plan: int | None = None

    def choose(self, losses: Floats, price: float | None) -> NDArray[np.intp]:
        """Plans [N] for predicted losses [N, K]; a row with a value that is not finite gets the full plan.

        `price` is what a loss of 1 costs, in units of the full decoder's cost. inf allows no expected loss; None means
        the full plan for all prompts.
        """
        last = losses.shape[1] - 1
        if self.plan is not None:
            return np.full(len(losses), self.plan)
        if price is None:
            return np.full(len(losses), last)
        return np.asarray(self.choose_each(losses, np.array([price]))[0])

    def choose_each(self, losses: Floats, prices: NDArray[np.float64]) -> NDArray[np.intp]:
        """Choose at each of T prices, as `choose` does [T, N]; needs memory for T x N x K numbers."""
        each = prices[:, None, None]
        expected = np.asarray(losses, np.float64) + (CAUTION * each if self.risk == "mean_score" else 0.0)
        with np.errstate(invalid="ignore"):
            cost = self.budgets + np.where(expected != 0, each * expected, 0.0)
        cost[:, ~np.isfinite(losses).all(axis=1), :-1] = np.inf
        cost[..., -1] = self.budgets[-1]
        return np.asarray(cost.argmin(axis=-1))


@dataclass(frozen=True, slots=True)
class FittedPredictor:
    """A fitted controller and the projection in front of it."""

    projection: Projection
    controller: Controller
    outliers: OutlierTest | None = None

    def predict(self, features: Features) -> Floats:
        """Expected losses [N, K] from raw features; NaN under every shortened plan for outliers."""
        return self.without_outliers(self.controller.predict(self.projection(features)), features)

    def without_outliers(self, losses: Floats, features: Features) -> Floats:
        """`losses` [N, K], changed in place: NaN under every shortened plan for outliers, so they run the full plan."""
        if self.outliers is not None:
            losses[self.outliers.are_outliers(features), :-1] = np.nan
        return losses


CONTROLLERS: Registry[type[Controller]] = Registry(
    "controllers",
    {
        "lightgbm": "controller.models.gbdt:LightGBMController",
        "mlp": "controller.models.mlp:MLPController",
        "logistic": "controller.models.logistic:LogisticController",
    },
)
"""Name -> class; the name is written in a saved allocator."""
