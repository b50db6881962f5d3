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
    """Predicts the quality of each plan for each prompt, from 0 to 1.

    The scale is that of `controller.certificate.risks.plan_quality`. Where only losses count quality is 1 - loss, and
    1 for the full plan. Where a plan may win it is (1 + score - full model's score) / 2, and 1/2 for the full plan.

    `fit` is called once, by the tune and train stages, `predict` any number of times, also while serving, from several
    threads. A row's prediction does not depend on the other rows, and has the same bits after `save` and `load`. A
    controller keeps no reference to its arguments. A new one implements `_fit` and `_predict`, which see finite numbers
    only.

    Attributes:
        FILES: names of the files that `save` writes and `load` reads, each `controller.*` (`controller.models.files`).
    """

    FILES: ClassVar[tuple[str, ...]]

    def fit(self, features: Floats, quality: Floats, budgets: Floats) -> None:
        """Learn from N prompts.

        Args:
            features: projected features [N, F].
            quality: of each plan for each prompt, in [0, 1], [N, K]; the last column is one number, above 0.
            budgets: share of the decoder that each plan runs [K], ascending, the last 1.

        Raises:
            LearningError: features that are not finite, quality outside [0, 1], or a full plan whose quality varies.
        """
        if bad := int((~np.isfinite(features).all(axis=1)).sum()):
            raise LearningError(f"{bad} of {len(features)} prompts have features that are not finite; leave them out")
        if not ((quality >= 0) & (quality <= 1)).all():
            raise LearningError("the shares of quality to learn from must lie in [0, 1]")
        if len(quality) and not (quality[0, -1] > 0 and (quality[:, -1] == quality[0, -1]).all()):
            raise LearningError("the full plan must keep the same for all prompts, more than 0")
        self._fit(np.array(features, np.float32), np.array(quality, np.float32), np.array(budgets, np.float32))

    def predict(self, features: Floats, full: float = 1.0) -> Floats:
        """Expected quality [N, K] in [0, 1] for features [N, F].

        The last column is `full`, the full plan's quality in the training data, which the files do not hold. A row with
        a feature that is not finite is NaN under every shortened plan, so `choose` gives it the full plan.
        """
        finite = np.asarray(np.isfinite(features).all(axis=1))
        quality = self._predict(np.where(finite[:, None], features, 0.0).astype(np.float32)).astype(np.float32)
        quality[~finite] = np.nan
        quality[:, -1] = full
        return quality

    @abstractmethod
    def _fit(self, features: Floats, quality: Floats, budgets: Floats) -> None:
        """See `fit`."""

    @abstractmethod
    def _predict(self, features: Floats) -> Floats:
        """See `predict`; the last column is overwritten."""

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


def plan_losses(quality: NDArray[Any]) -> NDArray[np.float64]:
    """Loss of each plan against the full one [N, K], below 0 where it wins.

    Defined as 1 - quality / full plan's quality.
    With a full plan of 1/2 that is the full model's score - the plan's.
    """
    shares = np.asarray(quality, dtype=np.float64)
    return np.asarray(1.0 - shares / shares[:, -1:])


CAUTION = 1e-3
"""Expected gain that a plan must have, in units of loss for each unit of the price, where plans can win."""


def choose(quality: Floats, budgets: NDArray[Any], price: float | None) -> NDArray[np.intp]:
    """Choose the plan of least budget + price x expected loss for each row.

    That is the Lagrangian of "the least mean budget whose mean loss is at most alpha" (the multiple-choice knapsack of
    Glavas et al. 2024, arXiv 2410.20022, section 4, with predictions for scores). Of equally costly plans the cheaper
    one. Expected gains are noisy, and the highest price would follow every one of them; so a gain counts less `CAUTION`
    times the price. Then the highest price runs the full plan for all, each lower one shortens more prompts, and the
    sequence of tests (`controller.certificate.calibration`) does not fail at its first step.

    Args:
        quality: predicted [N, K]; a row with a value that is not finite gets the full plan.
        budgets: of each plan [K].
        price: of a loss of 1, in decoders; inf accepts no expected loss at all; None is the full plan for all.
    """
    if price is None:
        return np.full(len(quality), quality.shape[1] - 1)
    return np.asarray(choose_each(quality, budgets, np.array([price]))[0])


def choose_each(quality: Floats, budgets: NDArray[Any], prices: NDArray[np.float64]) -> NDArray[np.intp]:
    """The choices of `choose` at each of T prices [T, N]; needs memory for T x N x K numbers."""
    each = prices[:, None, None]
    expected = plan_losses(quality) + np.where(quality[:, -1:] < 1, CAUTION * each, 0.0)  # only where plans can win
    with np.errstate(invalid="ignore"):
        cost = np.asarray(budgets, dtype=np.float64) + np.where(expected != 0, each * expected, 0.0)
    cost[:, ~np.isfinite(quality).all(axis=1), :-1] = np.inf
    cost[..., -1] = budgets[-1]
    return np.asarray(cost.argmin(axis=-1))


@dataclass(frozen=True, slots=True)
class FittedPredictor:
    """A fitted controller and the projection in front of it."""

    projection: Projection
    controller: Controller
    full: float = 1.0
    """The full plan's quality, see `Controller.predict`."""
    outliers: OutlierTest | None = None

    def predict(self, features: Features) -> Floats:
        """Expected quality [N, K] from raw features; NaN under every shortened plan for outliers."""
        return self.without_outliers(self.controller.predict(self.projection(features), self.full), features)

    def without_outliers(self, quality: Floats, features: Features) -> Floats:
        """The same [N, K] with NaN under every shortened plan for outliers, so that they run the full plan."""
        if self.outliers is not None:
            quality[self.outliers.are_outliers(features), :-1] = np.nan
        return quality


CONTROLLERS: Registry[type[Controller]] = Registry(
    "controllers",
    {
        "lightgbm": "controller.models.gbdt:LightGBMController",
        "mlp": "controller.models.mlp:MLPController",
        "logistic": "controller.models.logistic:LogisticController",
    },
)
"""Name -> class; the name is written in a saved allocator."""
