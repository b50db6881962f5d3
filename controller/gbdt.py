"""LightGBM over (features, budget): one model for all plans, more sure of a plan the more of the model it runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightgbm
import numpy as np

from controller.base import Bools, Controller, Floats, Trial


class LightGBMController(Controller):
    """Gradient-boosted trees on rows (prompt features, plan budget) -> is the plan sufficient?

    A monotone constraint keeps the probability from falling as the budget grows.

    Source: Ke et al. 2017, LightGBM, NeurIPS 30.

    Args:
        n_trees: boosting rounds.
        learning_rate: shrinkage of each tree.
        n_leaves: leaves of a tree.
        min_leaf_rows: (prompt, plan) rows that a leaf must hold.
        feature_share: share of the features that each tree sees.
        l2: penalty on leaf values.
        seed: of the feature draws.
    """

    def __init__(
        self,
        n_trees: int = 150,
        learning_rate: float = 0.05,
        n_leaves: int = 8,
        min_leaf_rows: int = 20,
        feature_share: float = 0.5,
        l2: float = 1.0,
        seed: int = 0,
    ) -> None:
        self._n_trees = n_trees
        self._parameters = {
            "objective": "binary",
            "learning_rate": learning_rate,
            "num_leaves": n_leaves,
            "min_data_in_leaf": min_leaf_rows,
            "feature_fraction": feature_share,
            "lambda_l2": l2,
            "seed": seed,
            "deterministic": True,
            "force_row_wise": True,
            "verbosity": -1,
        }
        self._booster: lightgbm.Booster | None = None
        self._budgets = np.zeros(0, dtype=np.float32)

    @staticmethod
    def suggest(trial: Trial) -> dict[str, Any]:
        return {
            "n_trees": trial.suggest_int("n_trees", 40, 400, log=True),
            "learning_rate": trial.suggest_float("learning_rate", 0.02, 0.2, log=True),
            "n_leaves": trial.suggest_int("n_leaves", 3, 31, log=True),
            "min_leaf_rows": trial.suggest_int("min_leaf_rows", 5, 100, log=True),
            "feature_share": trial.suggest_float("feature_share", 0.2, 1.0),
            "l2": trial.suggest_float("l2", 0.1, 30.0, log=True),
        }

    def fit(self, features: Floats, sufficient: Bools, budgets: Floats) -> None:
        self._budgets = np.array(budgets, dtype=np.float32)
        rows = self._rows(features)
        constraints = [0] * features.shape[1] + [1]
        data = lightgbm.Dataset(rows, label=sufficient[:, :-1].reshape(-1).astype(np.float32))
        parameters = {**self._parameters, "monotone_constraints": constraints}
        self._booster = lightgbm.train(parameters, data, num_boost_round=self._n_trees)

    def _rows(self, features: Floats) -> Floats:
        """[N, F] -> [N * (K - 1), F + 1]: each prompt with the budget of each shortened plan."""
        shortened = self._budgets[:-1]
        repeated = np.repeat(features, len(shortened), axis=0)
        return np.column_stack([repeated, np.tile(shortened, len(features))])

    def predict(self, features: Floats) -> Floats:
        if self._booster is None:
            raise RuntimeError("this controller was not fitted")
        sure = np.asarray(self._booster.predict(self._rows(features)), dtype=np.float32).reshape(len(features), -1)
        return np.column_stack([sure, np.ones(len(features), dtype=np.float32)])

    def save(self, folder: Path) -> None:
        if self._booster is None:
            raise RuntimeError("this controller was not fitted")
        (folder / "controller.txt").write_text(self._booster.model_to_string())
        (folder / "controller.json").write_text(json.dumps({"budgets": [float(b) for b in self._budgets]}))

    @classmethod
    def load(cls, folder: Path) -> LightGBMController:
        """Reads `controller.txt`, which must be intact: LightGBM ends the process on a damaged one. The allocator
        checks its SHA-256 first."""
        controller = cls()
        controller._booster = lightgbm.Booster(model_str=(folder / "controller.txt").read_text())
        budgets = json.loads((folder / "controller.json").read_text())["budgets"]
        controller._budgets = np.array(budgets, dtype=np.float32)
        return controller
