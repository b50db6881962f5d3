"""What a controller is, and the one place where its predictions become a choice of plans.

To add one: a class that keeps this contract, one line that registers it (in `CONTROLLERS`, or in the entry points of a
package of one's own), and a test class that inherits `controller.testing.ControllerConformance`.

Shapes: `N` prompts, `F` features, `K` plans, cheapest first, the last full.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from backbone.errors import InputError
from backbone.registry import Registry

Floats = NDArray[np.float32]


class LearningError(InputError):
    """Prompts that nothing can be learned from; the message says why."""


class Trial(Protocol):
    """The part of an Optuna trial that a search space needs."""

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float: ...
    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int: ...
    def suggest_categorical(self, name: str, choices: Any) -> Any: ...


class Controller(ABC):
    """Predicts, for each prompt and plan, how much quality the plan keeps, on a scale from 0 to 1.

    Where only losses count, that is 1 - loss, and the full plan keeps 1. For the loss "the answer is no longer
    sufficient", 0 or 1, it is the probability that the plan is sufficient; for a loss between 0 and 1, its expectation.
    Where a plan may also win, it is (1 + score - full model's score) / 2, and the full plan keeps 1/2: see `lost`.

    `fit` is called once, by the tune and train stages, `predict` any number of times, also while serving, from several
    threads. `predict` gives the same numbers for the same row whatever the other rows, their order and their number,
    and after `save` and `load` the same bits. A controller keeps no reference to the arrays it is given. A new one
    implements `_fit` and `_predict`, which see finite numbers only.

    Attributes:
        FILES: names of the files that `save` writes and `load` reads, each `controller.*` (`controller.models.files`).
    """

    FILES: ClassVar[tuple[str, ...]]

    def fit(self, features: Floats, kept: Floats, budgets: Floats) -> None:
        """Learn from N prompts.

        Args:
            features: projected features [N, F].
            kept: what each plan keeps for each prompt, in [0, 1], [N, K]; the last column is the same for all, above 0.
            budgets: share of the decoder that each plan runs [K], ascending, the last 1.

        Raises:
            LearningError: features that are not finite, a share outside [0, 1], or a full plan that does not keep the
                same for all.
        """
        if bad := int((~np.isfinite(features).all(axis=1)).sum()):
            raise LearningError(f"{bad} of {len(features)} prompts have features that are not finite; leave them out")
        if not ((kept >= 0) & (kept <= 1)).all():
            raise LearningError("the shares of quality to learn from must lie in [0, 1]")
        if len(kept) and not (kept[0, -1] > 0 and (kept[:, -1] == kept[0, -1]).all()):
            raise LearningError("the full plan must keep the same for all prompts, more than 0")
        self._fit(np.array(features, np.float32), np.array(kept, np.float32), np.array(budgets, np.float32))

    def predict(self, features: Floats, full: float = 1.0) -> Floats:
        """[N, F] -> what is expected to be kept, in [0, 1], [N, K].

        The last column, the full plan, is `full`: what it was in what the controller learned from, which is not in its
        files. A row with a feature that is not finite is NaN under every shortened plan, and gets the full one from
        `choose`.
        """
        finite = np.asarray(np.isfinite(features).all(axis=1))
        kept = self._predict(np.where(finite[:, None], features, 0.0).astype(np.float32)).astype(np.float32)
        kept[~finite] = np.nan
        kept[:, -1] = full
        return kept

    @abstractmethod
    def _fit(self, features: Floats, kept: Floats, budgets: Floats) -> None:
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
        """Read what `save` wrote; raises LearningError for anything else, which may be damaged or come from anybody."""

    @staticmethod
    def suggest(trial: Trial) -> dict[str, Any]:
        """Constructor arguments to try, drawn from the trial, each under its own name; none where there is nothing to
        tune."""
        return {}

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """Default of each constructor argument; those that are tuned lie in the range of `suggest`."""
        arguments = inspect.signature(cls.__init__).parameters.values()
        return {argument.name: argument.default for argument in arguments if argument.default is not argument.empty}


def lost(kept: NDArray[Any]) -> NDArray[np.float64]:
    """[N, K]: what each plan loses against the full one, 1 - kept / what the full plan keeps; below 0 where it wins.

    Where the full plan keeps 1 that is 1 - kept. Where it keeps 1/2, and a plan (1 + score - full model's score) / 2,
    it is the full model's score less the plan's.
    """
    shares = np.asarray(kept, dtype=np.float64)
    return np.asarray(1.0 - shares / shares[:, -1:])


CAUTION = 1e-3
"""How much a plan must be expected to win, in units of loss and for each unit of the price, where plans can win."""


def choose(kept: Floats, budgets: NDArray[Any], price: float | None) -> NDArray[np.intp]:
    """The decision: for each row of `kept` [N, K] the plan that costs least when loss is paid for.

    The cost of a plan is its budget plus `price` times what it loses: the Lagrangian of "the least mean budget whose
    mean loss is at most alpha" (the multiple-choice knapsack of Glavas et al. 2024, arXiv 2410.20022, section 4, with
    predictions for scores). Of equally costly plans the cheaper one. A plan that is expected to be better than the full
    one gets the price for what it wins, less `CAUTION` times the price. Expected wins are noisy, and the highest price
    would else follow every one of them. So the highest price runs the full plan for all, each lower one lets more
    prompts go, and the sequence of tests from high to low (`controller.certificate.calibration`) does not fail at its
    first step.

    Args:
        kept: what each plan is expected to keep; a row with a value that is not finite gets the full plan.
        budgets: of each plan [K].
        price: what a loss of 1 costs, in decoders; inf accepts no expected loss at all; None is the full plan for all.
    """
    if price is None:
        return np.full(len(kept), kept.shape[1] - 1)
    return np.asarray(choose_each(kept, budgets, np.array([price]))[0])


def choose_each(kept: Floats, budgets: NDArray[Any], prices: NDArray[np.float64]) -> NDArray[np.intp]:
    """[T, N]: what `choose` gives at each of T prices, in memory for T x N x K numbers."""
    each = prices[:, None, None]
    expected = lost(kept) + np.where(kept[:, -1:] < 1, CAUTION * each, 0.0)  # caution only where plans can win
    with np.errstate(invalid="ignore"):
        cost = np.asarray(budgets, dtype=np.float64) + np.where(expected != 0, each * expected, 0.0)
    cost[:, ~np.isfinite(kept).all(axis=1), :-1] = np.inf
    cost[..., -1] = budgets[-1]
    return np.asarray(cost.argmin(axis=-1))


CONTROLLERS: Registry[type[Controller]] = Registry(
    "controllers",
    {
        "lightgbm": "controller.models.gbdt:LightGBMController",
        "mlp": "controller.models.mlp:MLPController",
        "logistic": "controller.models.logistic:LogisticController",
    },
)
"""Name -> class; the name is written in a saved allocator."""
