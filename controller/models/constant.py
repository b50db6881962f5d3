"""Controllers that learn nothing from features: the yardsticks on the same driver as the learned ones."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from controller.base import Controller, Floats, LearningError
from controller.models.files import DESCRIPTION, read_description, write_description

MOST_PLANS = 10_000
"""A damaged file is not to fill the memory."""


class MixtureController(Controller):
    """Draws each prompt's plan with fixed probabilities, whatever the prompt; one plan with probability 1 is static.

    It says that the plan drawn keeps everything and the others nothing, so that any price of 1 or more chooses it.
    The draw is a hash of the row, so it is the same wherever the row stands.

    Args:
        weights: probability of each of the K plans.
        seed: another seed draws other plans.
    """

    FILES = (DESCRIPTION,)

    def __init__(self, weights: list[float], seed: int = 0) -> None:
        self.weights, self.seed = list(weights), seed

    @classmethod
    def static(cls, n_plans: int, index: int) -> MixtureController:
        """All prompts run plan `index`."""
        return cls([float(i == index) for i in range(n_plans)])

    def _fit(self, features: Floats, kept: Floats, budgets: Floats) -> None:
        """Nothing to learn."""

    def _predict(self, features: Floats) -> Floats:
        draws = np.array([_uniform(row, self.seed) for row in features])
        chosen = np.minimum(np.searchsorted(np.cumsum(self.weights), draws, side="right"), len(self.weights) - 1)
        kept = np.zeros((len(features), len(self.weights)), dtype=np.float32)
        kept[np.arange(len(features)), chosen] = 1.0
        return kept

    def save(self, folder: Path) -> None:
        write_description(folder, {"weights": self.weights, "seed": self.seed})

    @classmethod
    def load(cls, folder: Path) -> MixtureController:
        data = read_description(folder, {"weights": list, "seed": int})
        if not _are_shares(data["weights"]) or not 0 <= data["seed"] < 2**32:
            raise LearningError(f"{folder} holds no mixture: weights should be shares, and the seed a small number")
        return cls(**data)


class OracleController(Controller):
    """Looks the answer up: knows what each plan keeps for the prompts it was fitted on, full plan elsewhere."""

    FILES = (DESCRIPTION,)

    def __init__(self) -> None:
        self._known: dict[str, list[float]] = {}
        self._n_plans = 0

    def _fit(self, features: Floats, kept: Floats, budgets: Floats) -> None:
        self._n_plans = kept.shape[1]
        self._known = {_row_hash(row): plans.tolist() for row, plans in zip(features, kept, strict=True)}

    def _predict(self, features: Floats) -> Floats:
        nothing = [0.0] * self._n_plans
        return np.array([self._known.get(_row_hash(row), nothing) for row in features], dtype=np.float32)

    def save(self, folder: Path) -> None:
        write_description(folder, {"n_plans": self._n_plans, "known": self._known})

    @classmethod
    def load(cls, folder: Path) -> OracleController:
        controller, data = cls(), read_description(folder, {"n_plans": int, "known": dict})
        n_plans, rows = data["n_plans"], data["known"].values()
        if not 0 <= n_plans <= MOST_PLANS or not all(_are_shares(row) and len(row) == n_plans for row in rows):
            raise LearningError(f"{folder} holds no oracle: each prompt should have a share for each plan")
        controller._n_plans, controller._known = data["n_plans"], data["known"]
        return controller


def _are_shares(values: object) -> bool:
    return isinstance(values, list) and all(type(value) in (int, float) and 0 <= value <= 1 for value in values)


def _row_hash(row: Floats, seed: int = 0) -> str:
    return hashlib.sha256(seed.to_bytes(4, "big") + np.ascontiguousarray(row, dtype=np.float32).tobytes()).hexdigest()


def _uniform(row: Floats, seed: int) -> float:
    return int(_row_hash(row, seed)[:13], 16) / 16**13
