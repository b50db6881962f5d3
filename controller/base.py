"""The contract of controllers, and the choice of plans from predictions.

To add a controller: a class that keeps this contract, a line that registers it (in `CONTROLLERS`, or in the entry
points of your own package), and a test class that inherits `controller.testing.ControllerConformance`.

Shapes: `N` prompts, `F` features, `K` plans, cheapest first, the last full.
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
"""Sets as wide as the hidden size, of which controllers see principal components."""


class LearningError(InputError):
    """Features or prompts that teach nothing, or a damaged file."""


def check_sets(sets: Sequence[str]) -> None:
    """Raises LearningError for names that are no sets of features."""
    if unknown := [name for name in sets if name not in FEATURE_SETS]:
        raise LearningError(f"unknown features {unknown[0]!r}; known are {', '.join(FEATURE_SETS)}")


class Trial(Protocol):
    """The part of an Optuna trial that a search space needs."""

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float: ...
    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int: ...
    def suggest_categorical(self, name: str, choices: Any) -> Any: ...


class Controller(ABC):
    """Predicts the loss of each plan for each prompt, from -1 to 1, below 0 where the plan is expected to win.

    The losses are those of `controller.certificate.risks.plan_losses`; the full plan's is 0.

    `fit` is called once, by the tune and train stages, `predict` any number of times, also while serving, from several
    threads. A row's prediction does not depend on the other rows, and has the same bits after `save` and `load`. A
    controller keeps no reference to its arguments. A new one implements `_fit` and `_predict`, which see finite numbers
    only.

    Attributes:
        FILES: names of the files that `save` writes and `load` reads, each `controller.*` (`controller.models.files`).
        loss_range: of a model that learns by cross-entropy. None in files of before losses were predicted; whoever
            loads those sets it.
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
            LearningError: features that are not finite, losses outside [-1, 1], or a full plan that loses something.
        """
        if bad := int((~np.isfinite(features).all(axis=1)).sum()):
            raise LearningError(f"{bad} of {len(features)} prompts have features that are not finite; leave them out")
        if not (np.abs(losses) <= 1).all():
            raise LearningError("the losses to learn from must lie in [-1, 1]")
        if losses[:, -1].any():
            raise LearningError("the full plan is the last one, and its loss must be 0 for all prompts")
        self._fit(np.array(features, np.float32), np.array(losses, np.float32), np.array(budgets, np.float32))

    def predict(self, features: Floats) -> Floats:
        """Expected losses [N, K] for features [N, F]; the full plan's is 0.

        A row with a feature that is not finite is NaN under every shortened plan, so it gets the full plan.

        Raises:
            LearningError: `_predict` gave the full plan a loss.
        """
        finite = np.asarray(np.isfinite(features).all(axis=1))
        losses = self._predict(np.where(finite[:, None], features, 0.0).astype(np.float32)).astype(np.float32)
        if (wrong := np.abs(losses[:, -1]) > 0.1).any():  # else it is rounding
            raise LearningError(
                f"{type(self).__name__} predicts {losses[wrong, -1][0]:g} for the full plan, whose loss is 0: "
                "controllers predict losses, no longer the quality kept; change and fit it anew"
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
        """Constructor arguments to try, drawn from the trial; none where nothing is tuned."""
        return {}

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """Defaults of constructor arguments, within the ranges of `suggest`."""
        arguments = inspect.signature(cls.__init__).parameters.values()
        return {argument.name: argument.default for argument in arguments if argument.default is not argument.empty}


def fitted(model: T | None) -> T:
    """The model of a controller; raises RuntimeError where there is none yet."""
    if model is None:
        raise RuntimeError("this controller was not fitted")
    return model


@dataclass(frozen=True, slots=True)
class LossRange:
    """Losses from the least one, -1 or 0, to 1, between which a model that learns by cross-entropy predicts."""

    least: float

    @classmethod
    def of(cls, losses: Floats) -> LossRange:
        """From -1 if a plan wins on any prompt, else from 0."""
        return cls(-1.0 if (losses < 0).any() else 0.0)

    def targets(self, losses: Floats) -> Floats:
        """Targets of cross-entropy in [0, 1] for losses of shortened plans; 1 for the least loss."""
        return np.ascontiguousarray((1.0 - losses) / (1.0 - self.least))

    def losses(self, predicted: NDArray[Any]) -> Floats:
        """Losses [N, K] for predicted targets of the shortened plans [N, K - 1]."""
        return np.column_stack([1.0 - (1.0 - self.least) * predicted, np.zeros(len(predicted))])


CAUTION = 1e-3
"""Expected gain that a plan must have, in units of loss for each unit of the price, where plans can win."""


@dataclass(frozen=True, slots=True)
class ChoiceRule:
    """Choose the plan of least budget + price x expected loss.

    That is the Lagrangian of "the least mean budget whose mean loss is at most alpha" (the multiple-choice knapsack of
    Glavas et al. 2024, arXiv 2410.20022, section 4, with predictions for scores). Of equally costly plans the cheaper
    one. Under `mean_score` plans can win. Expected gains are noisy, and the highest price would follow every one of
    them; so a gain counts less `CAUTION` times the price. Then the highest price runs the full plan for all, each lower
    one shortens more prompts, and the sequence of tests (`controller.certificate.calibration`) does not fail at its
    first step.

    Attributes:
        budgets: of each plan [K].
        risk: which loss is predicted.
    """

    budgets: NDArray[Any]
    risk: Risk

    def choose(self, losses: Floats, price: float | None) -> NDArray[np.intp]:
        """Plans [N] for predicted losses [N, K]; a row with a value that is not finite gets the full plan.

        The price is that of a loss of 1, in decoders; inf accepts no expected loss, None is the full plan for all.
        """
        if price is None:
            return np.full(len(losses), losses.shape[1] - 1)
        return np.asarray(self.choose_each(losses, np.array([price]))[0])

    def choose_each(self, losses: Floats, prices: NDArray[np.float64]) -> NDArray[np.intp]:
        """The choices of `choose` at each of T prices [T, N]; needs memory for T x N x K numbers."""
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
        """The same [N, K] with NaN under every shortened plan for outliers, so that they run the full plan."""
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
