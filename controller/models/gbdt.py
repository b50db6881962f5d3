"""Gradient-boosted trees (LightGBM) that predict the losses of plans."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file

from controller.base import Controller, Floats, LearningError, LossRange, Trial
from controller.models.files import WEIGHTS, Layout, fitted, metadata_of, read_metadata, read_weights
from controller.models.trees import KINDS, Forest


class LightGBMController(Controller):
    """Boosted trees, one model for each plan or one for all plans.

    Learns by cross-entropy. One model for all plans has rows (features, plan budget) and a monotone constraint: the
    expected loss never grows with the budget, which reduces noise where the menu is nested.

    LightGBM trains the trees; a `Forest` stores and evaluates them. No file reaches LightGBM, and prediction does not
    need the library.

    Source: Ke et al. 2017, LightGBM, NeurIPS 30.

    Args:
        n_trees: boosting rounds.
        learning_rate: shrinkage of each tree.
        n_leaves: leaves of a tree.
        min_leaf_rows: rows that a leaf must hold.
        feature_share: share of the features that each tree sees.
        l2: penalty on leaf values.
        per_plan: a model for each plan; otherwise one for all.
        seed: of the feature draws.
    """

    FILES = (WEIGHTS,)

    def __init__(
        self,
        n_trees: int = 100,
        learning_rate: float = 0.05,
        n_leaves: int = 6,
        min_leaf_rows: int = 20,
        feature_share: float = 0.5,
        l2: float = 1.0,
        per_plan: bool = True,
        seed: int = 0,
    ) -> None:
        self._n_trees, self._per_plan = n_trees, per_plan
        self._parameters = {
            "objective": "cross_entropy",
            "learning_rate": learning_rate,
            "num_leaves": n_leaves,
            "min_data_in_leaf": min_leaf_rows,
            "feature_fraction": feature_share,
            "lambda_l2": l2,
            "seed": seed,
            "deterministic": True,
            "force_col_wise": True,
            "max_bin": 63,
            "num_threads": 1,  # rows are few: more threads only wait for each other
            "verbosity": -1,
        }
        self._forest: Forest | None = None
        self._budgets = np.zeros(0, dtype=np.float32)

    @staticmethod
    def suggest(trial: Trial) -> dict[str, Any]:
        return {
            "n_trees": trial.suggest_int("n_trees", 40, 300, log=True),
            "learning_rate": trial.suggest_float("learning_rate", 0.02, 0.2, log=True),
            "n_leaves": trial.suggest_int("n_leaves", 3, 24, log=True),
            "min_leaf_rows": trial.suggest_int("min_leaf_rows", 5, 100, log=True),
            "feature_share": trial.suggest_float("feature_share", 0.2, 1.0),
            "l2": trial.suggest_float("l2", 0.1, 30.0, log=True),
            "per_plan": trial.suggest_categorical("per_plan", [False, True]),
        }

    def _fit(self, features: Floats, losses: Floats, budgets: Floats) -> None:
        self._budgets, self.loss_range = budgets.copy(), LossRange.of(losses)
        targets = self.loss_range.targets(losses[:, :-1])
        if self._per_plan:
            self._forest = self._trained(features, list(targets.T), self._parameters)
        else:
            constraints = {"monotone_constraints": [0] * features.shape[1] + [1]}
            self._forest = self._trained(self._rows(features), [targets.ravel()], {**self._parameters, **constraints})

    def _trained(self, rows: Floats, targets: list[Floats], parameters: dict[str, Any]) -> Forest:
        """A model for each of the targets [N], with the same bins of rows [N, F]."""
        import lightgbm  # of the extra `pipelines`: who predicts needs none

        data = lightgbm.Dataset(rows, params=parameters)
        models = [
            lightgbm.train(parameters, data.set_label(np.ascontiguousarray(target)), num_boost_round=self._n_trees)
            for target in targets
        ]
        return Forest.of_lightgbm([model.model_to_string() for model in models], rows.shape[1])

    def _rows(self, features: Floats) -> Floats:
        """Rows [N * (K - 1), F + 1]: each prompt with the budget of each shortened plan."""
        shortened = self._budgets[:-1]
        repeated = np.repeat(features, len(shortened), axis=0)
        return np.column_stack([repeated, np.tile(shortened, len(features))])

    def _predict(self, features: Floats) -> Floats:
        predicted = fitted(self._forest)(features if self._per_plan else self._rows(features))
        return fitted(self.loss_range).losses(predicted.reshape(len(features), -1))

    def save(self, folder: Path) -> None:
        forest = fitted(self._forest)
        about = metadata_of(self.loss_range, per_plan=self._per_plan, n_features=forest.n_features)
        save_file({"budgets": self._budgets, **forest.arrays}, folder / WEIGHTS, about)

    @classmethod
    def load(cls, folder: Path) -> LightGBMController:
        """Raises LearningError for a file that `save` did not write; see `Forest`."""
        loss_range, about = read_metadata(folder, {"per_plan": bool, "n_features": int})
        weights = {name: tensor.numpy() for name, tensor in read_weights(folder, LAYOUT, TYPES).items()}
        controller = cls(per_plan=about["per_plan"])
        controller._budgets, controller.loss_range = weights.pop("budgets"), loss_range
        try:
            forest = Forest(weights, about["n_features"])
        except LearningError as error:
            raise LearningError(f"{folder / WEIGHTS} holds no controller: {error}") from None
        n_models = len(controller._budgets) - 1 if about["per_plan"] else 1
        if forest.n_models != n_models or not ((controller._budgets > 0) & (controller._budgets <= 1)).all():
            raise LearningError(f"{folder / WEIGHTS} holds no controller: its budgets and its trees do not fit")
        controller._forest = forest
        return controller


_NODES = ("feature", "threshold", "left", "right", "value")
LAYOUT: Layout = {
    **dict.fromkeys(_NODES, ("nodes",)),
    "roots": ("trees",),
    "counts": ("models",),
    "budgets": ("plans",),
}
TYPES = {name: getattr(torch, kind.__name__) for name, kind in KINDS.items()}
