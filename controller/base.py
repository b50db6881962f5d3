"""What a controller is, and the one place where its predictions become a choice of plans.

To add one: a file here with a class that keeps this contract, its line in `CONTROLLERS`, and a test class that inherits
`controller.testing.ControllerConformance`.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]

CONTROLLERS: dict[str, str] = {
    "lightgbm": "controller.gbdt:LightGBMController",
    "mlp": "controller.mlp:MLPController",
    "mixture": "controller.constant:MixtureController",
    "oracle": "controller.constant:OracleController",
}
"""Name -> module:class; the name is written in a saved allocator."""


class Trial(Protocol):
    """The part of an Optuna trial that a search space needs."""

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float: ...
    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int: ...


class Controller(ABC):
    """Predicts, for each prompt and plan, the probability that the plan is sufficient.

    `fit` is called once, by the tune and train stages, `predict` any number of times, also while serving, from several
    threads. `predict` gives the same numbers for the same row whatever the other rows, their order and their number,
    and after `save` and `load` the same bits. A controller keeps no reference to the arrays it is given.
    """

    @abstractmethod
    def fit(self, features: Floats, sufficient: Bools, budgets: Floats) -> None:
        """Learn from N prompts.

        Args:
            features: projected features [N, F].
            sufficient: whether each plan is sufficient for each prompt [N, K]; the last column is True.
            budgets: share of the decoder that each plan runs [K], ascending, the last 1.
        """

    @abstractmethod
    def predict(self, features: Floats) -> Floats:
        """[N, F] -> probabilities in [0, 1], [N, K]; the last column, the full plan, is 1."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write files named `controller.*` into an existing folder."""

    @classmethod
    @abstractmethod
    def load(cls, folder: Path) -> Controller:
        """Read what `save` wrote."""

    @staticmethod
    def suggest(trial: Trial) -> dict[str, Any]:
        """Constructor arguments to try, drawn from the trial; none where there is nothing to tune."""
        return {}


def choose(kept: Floats, budgets: NDArray[np.floating], price: float) -> NDArray[np.intp]:
    """The decision: for each row of [N, K] the plan with the least budget + price * expected loss, ties to the cheaper.

    A row with a value that is not finite gets the full plan.
    """
    finite = np.isfinite(kept).all(axis=1)
    cost = np.asarray(budgets, dtype=np.float64) + price * (1.0 - kept.astype(np.float64))
    return np.asarray(np.where(finite, cost.argmin(axis=1), kept.shape[1] - 1))


def controller_class(name: str) -> type[Controller]:
    """The class registered under a name."""
    module, _, attribute = CONTROLLERS[name].partition(":")
    found: type[Controller] = getattr(importlib.import_module(module), attribute)
    return found
