"""A small ensemble: trees and a network err in different places."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from controller.base import Controller, Floats, Trial
from controller.models.gbdt import LightGBMController
from controller.models.mlp import MLPController

_MEMBERS: dict[str, type[LightGBMController] | type[MLPController]] = {
    "lightgbm": LightGBMController,
    "mlp": MLPController,
}


class EnsembleController(Controller):
    """The mean of what LightGBM and the MLP expect.

    Args:
        settings: arguments of the members, named `lightgbm_` or `mlp_` and the argument; what is not given is default.
    """

    FILES = (*LightGBMController.FILES, *MLPController.FILES)

    def __init__(self, **settings: Any) -> None:
        self._members: list[LightGBMController | MLPController] = [
            member(**{key.removeprefix(f"{name}_"): value for key, value in settings.items() if key.startswith(name)})
            for name, member in _MEMBERS.items()
        ]

    @staticmethod
    def suggest(trial: Trial) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, member in _MEMBERS.items():
            settings = member.suggest(_Prefixed(trial, f"{name}_"))
            found |= {f"{name}_{key}": value for key, value in settings.items()}
        return found

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        return {f"{name}_{key}": value for name, member in _MEMBERS.items() for key, value in member.defaults().items()}

    def _fit(self, features: Floats, kept: Floats, budgets: Floats) -> None:
        for member in self._members:
            member.fit(features, kept, budgets)

    def _predict(self, features: Floats) -> Floats:
        first, second = (member.predict(features) for member in self._members)
        mean: Floats = (first + second) * np.float32(0.5)
        return mean

    def save(self, folder: Path) -> None:
        for member in self._members:
            member.save(folder)

    @classmethod
    def load(cls, folder: Path) -> EnsembleController:
        controller = cls()
        controller._members = [member.load(folder) for member in _MEMBERS.values()]
        return controller


class _Prefixed:
    """A trial that draws every setting under a longer name."""

    def __init__(self, trial: Trial, prefix: str) -> None:
        self._trial, self._prefix = trial, prefix

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        return self._trial.suggest_float(self._prefix + name, low, high, log=log)

    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int:
        return self._trial.suggest_int(self._prefix + name, low, high, log=log)

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        return self._trial.suggest_categorical(self._prefix + name, choices)
