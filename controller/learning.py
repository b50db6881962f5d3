"""Fitting of controllers with their projection, and cross-fitted predictions.

Shapes: `N` prompts, `K` plans, cheapest first, the last full.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from controller.base import CONTROLLERS, FittedPredictor, Floats
from controller.features import Features, Projection, rows_of

Doubles = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings of a fit.

    Attributes:
        name: of the controller, in `CONTROLLERS`.
        sets: the sets of features that it sees.
        components: principal components of the wide ones.
        parameters: arguments of the controller; the others are default.
    """

    name: str
    sets: tuple[str, ...]
    components: int
    parameters: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"sets": list(self.sets)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Settings:
        return cls(**{**data, "sets": tuple(data["sets"])})


def learn(
    settings: Settings, features: Features, losses: Doubles, budgets: Doubles, projection: Projection | None = None
) -> FittedPredictor:
    """Fit on N prompts with losses [N, K], with a new projection unless one is given."""
    if projection is None:
        projection = Projection.fit(features, settings.sets, settings.components)
    controller = CONTROLLERS[settings.name](**settings.parameters)
    controller.fit(projection(features), losses.astype(np.float32), budgets.astype(np.float32))
    return FittedPredictor(projection, controller)


def folds(n: int, n_folds: int, seed: int = 0) -> Iterator[tuple[NDArray[np.intp], NDArray[np.intp]]]:
    """Pairs of rows to fit on and rows held out, each row once."""
    order = np.random.default_rng(seed).permutation(n)
    for held in np.array_split(order, n_folds):
        yield np.setdiff1d(order, held), held


class CrossFit:
    """Predictions for N prompts, each by a controller that did not see it.

    Args:
        features: of the prompts.
        losses: of each plan [N, K].
        budgets: of the plans [K].
        n_folds: parts of the prompts that are held out in turn.
        most_components: of any settings.
        seed: of the folds.
    """

    def __init__(
        self, features: Features, losses: Doubles, budgets: Doubles, n_folds: int, most_components: int, seed: int = 0
    ) -> None:
        self._features, self._losses, self._budgets = features, losses, budgets
        self._folds, self._most = list(folds(len(losses), n_folds, seed)), most_components
        self._projections: dict[tuple[tuple[str, ...], int], Projection] = {}

    def predict(self, settings: Settings) -> Iterator[tuple[Floats, NDArray[np.intp]]]:
        """After each fold: predictions [N, K], and the rows that have one by now."""
        predicted = np.zeros(self._losses.shape, dtype=np.float32)
        for fold, (fitted, held) in enumerate(self._folds):
            features = rows_of(self._features, fitted)
            projection = self._projection(settings.sets, fold, features).first(settings.components)
            learned = learn(settings, features, self._losses[fitted], self._budgets, projection)
            predicted[held] = learned.predict(rows_of(self._features, held))
            yield predicted, np.concatenate([held for _, held in self._folds[: fold + 1]])

    def _projection(self, sets: tuple[str, ...], fold: int, features: Features) -> Projection:
        if (sets, fold) not in self._projections:
            self._projections[sets, fold] = Projection.fit(features, sets, self._most)
        return self._projections[sets, fold]
