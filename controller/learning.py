"""Fit a controller with its projection, and judge settings by predictions for prompts it was not fitted on.

Shapes: `N` prompts, `K` plans, cheapest first, the last full.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from controller.base import Controller, Floats, controller_class
from controller.features import Features, rows_of
from controller.projection import Projection


@dataclass(frozen=True, slots=True)
class Settings:
    """All that has to be known to fit a controller again.

    Attributes:
        name: of the controller, in `CONTROLLERS`.
        sets: the sets of features that it sees.
        components: principal components of the wide ones.
        parameters: arguments of the controller; what is not given is default.
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


@dataclass(frozen=True, slots=True)
class Learned:
    """A fitted controller and the projection in front of it."""

    projection: Projection
    controller: Controller

    def predict(self, features: Features) -> Floats:
        """Expected share of quality kept [N, K], from raw features."""
        return self.controller.predict(self.projection(features))


def learn(settings: Settings, features: Features, kept: NDArray[np.float64], budgets: NDArray[np.float64]) -> Learned:
    """Fit on N prompts with what each plan keeps of them [N, K]."""
    projection = Projection.fit(features, settings.sets, settings.components)
    controller = controller_class(settings.name)(**settings.parameters)
    controller.fit(projection(features), kept.astype(np.float32), budgets.astype(np.float32))
    return Learned(projection, controller)


def folds(n: int, n_folds: int) -> Iterator[tuple[NDArray[np.intp], NDArray[np.intp]]]:
    """(rows to fit on, rows held out), each row held out once; the same for every call."""
    order = np.random.default_rng(0).permutation(n)
    for held in np.array_split(order, n_folds):
        yield np.setdiff1d(order, held), held


def cross_fit(
    settings: Settings,
    features: Features,
    kept: NDArray[np.float64],
    budgets: NDArray[np.float64],
    n_folds: int = 4,
    after_fold: Callable[[Floats, NDArray[np.intp]], None] = lambda predicted, rows: None,
) -> Floats:
    """[N, K]: predictions for every prompt by a controller that did not see it.

    Args:
        after_fold: called after each fold with all predictions so far and the rows that have one; it may raise to stop.
    """
    predicted = np.zeros(kept.shape, dtype=np.float32)
    done: list[NDArray[np.intp]] = []
    for fitted, held in folds(len(kept), n_folds):
        learned = learn(settings, rows_of(features, fitted), kept[fitted], budgets)
        predicted[held] = learned.predict(rows_of(features, held))
        done.append(held)
        after_fold(predicted, np.concatenate(done))
    return predicted
