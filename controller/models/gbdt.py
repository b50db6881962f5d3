"""Gradient-boosted trees that predict the losses of plans: trained by LightGBM, kept as arrays, evaluated with numpy.

No file reaches LightGBM, and prediction does not need the library.

Shapes: `N` rows, `F` features, `T` trees, `M` models (sums of trees), `n` nodes of all trees.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file

from controller.base import Controller, Floats, LearningError, LossRange, Trial, fitted
from controller.models.files import WEIGHTS, Layout, metadata_of, read_metadata, read_weights

Doubles = NDArray[np.float64]
Ints = NDArray[np.int64]

KINDS: dict[str, type[np.generic]] = {
    **dict.fromkeys(("feature", "left", "right", "roots", "counts"), np.int32),
    **dict.fromkeys(("threshold", "value"), np.float64),
}
"""The arrays of a `Forest` with their types."""

_SIZES = {"roots": "trees", "counts": "models", "budgets": "plans"}
LAYOUT: Layout = {name: (_SIZES.get(name, "nodes"),) for name in (*KINDS, "budgets")}
TYPES = {name: getattr(torch, kind.__name__) for name, kind in KINDS.items()}

LEAF = -1
"""Stands for the feature, the left and the right child of a leaf."""
MOST_NODES, MOST_TREES, MOST_DEPTH = 2**22, 10**5, 512
"""Limits of the memory and time of a prediction."""
LARGEST_VALUE = 1e9
"""Of a leaf, in logits: beyond it sums could overflow."""
ZERO = np.float32(1e-35)
"""LightGBM takes features up to this size for 0 (`kZeroThreshold`)."""
CHUNK = 2**17
"""Rows x trees that are evaluated together."""


class Forest:
    """M sums of binary trees, T in all, over F features.

    The nodes of a tree are contiguous, its root first, children after their parent. A row goes to `left` where its
    feature is at most the threshold, else to `right`, down to a leaf's value.

    Args:
        arrays: `feature`, `threshold`, `left`, `right` and `value` [n]; `roots` [T], the first node of each tree;
            `counts` [M], how many trees each model sums.
        n_features: F.

    Raises:
        LearningError: arrays that are no such trees, or more of them than the limits.
    """

    def __init__(self, arrays: Mapping[str, NDArray[Any]], n_features: int) -> None:
        self.arrays = {name: np.asarray(arrays[name], dtype=kind) for name, kind in KINDS.items()}
        self.n_features = n_features
        self._check_sizes()
        wide = {name: self.arrays[name].astype(np.int64) for name in ("feature", "left", "right", "roots", "counts")}
        is_leaf = wide["feature"] == LEAF
        self._check_nodes(is_leaf, wide)
        depths = self._depths(is_leaf, wide)
        order = np.argsort(-depths, kind="stable")
        self._roots, self._unsorted = wide["roots"][order], np.argsort(order)
        self._active = [int((depths > level).sum()) for level in range(int(depths.max()))]
        own = np.arange(len(is_leaf))  # a leaf is its own left child, and no feature exceeds its threshold
        children = [np.where(is_leaf, own, wide[side]) for side in ("left", "right")]
        self._children = np.stack(children, axis=1).reshape(-1)
        self._feature = np.where(is_leaf, 0, wide["feature"])
        self._threshold = np.where(is_leaf, np.inf, self.arrays["threshold"])
        self._ends = np.cumsum(wide["counts"]).tolist()

    @classmethod
    def of_lightgbm(cls, models: Sequence[str], n_features: int) -> Forest:
        """From the texts of M trained boosters; raises LearningError for other than numeric decisions."""
        texts = [text.partition("\nend of trees")[0].split("\nTree=")[1:] for text in models]
        trees = [[_tree(text) for text in of_model] for of_model in texts]
        flat = [tree for of_model in trees for tree in of_model]
        roots = np.cumsum([0, *(len(tree["feature"]) for tree in flat)])
        for tree, root in zip(flat, roots, strict=False):
            for side in ("left", "right"):
                tree[side] = np.where(tree[side] == LEAF, LEAF, tree[side] + root)
        arrays = {name: np.concatenate([tree[name] for tree in flat]) for name in flat[0]}
        return cls({**arrays, "roots": roots[:-1], "counts": np.array([len(one) for one in trees])}, n_features)

    @property
    def n_models(self) -> int:
        return len(self._ends)

    def __call__(self, rows: Floats) -> Doubles:
        """Sigmoid of each sum [N, M] for rows [N, F], bit for bit as LightGBM."""
        if rows.ndim != 2 or rows.shape[1] != self.n_features:
            raise LearningError(f"the trees read {self.n_features} features, got rows of shape {rows.shape}")
        size = max(1, CHUNK // len(self._roots))
        sums = [self._sums(rows[start : start + size]) for start in range(0, len(rows), size)]
        return _sigmoid(np.concatenate([np.zeros((0, self.n_models)), *sums]))

    def _sums(self, rows: Floats) -> Doubles:
        """Sums [N, M] for rows [N, F]; the deepest trees come first."""
        flat = np.where(np.abs(rows) > ZERO, rows, 0).astype(np.float64).reshape(-1)
        offsets = (np.arange(len(rows)) * self.n_features)[:, None]
        nodes = np.repeat(self._roots[None], len(rows), axis=0)
        for active in self._active:
            at = nodes[:, :active]
            goes_right = flat.take(offsets + self._feature.take(at)) > self._threshold.take(at)
            nodes[:, :active] = self._children.take(2 * at + goes_right)
        values = self.arrays["value"].take(nodes[:, self._unsorted])
        # One after the other, as LightGBM adds; `sum` adds in pairs, which rounds otherwise.
        parts = [values[:, start:end] for start, end in pairwise([0, *self._ends])]
        return np.stack([np.add.accumulate(part, axis=1)[:, -1] for part in parts], axis=1)

    def _check_sizes(self) -> None:
        nodes, trees, counts = (self.arrays[name] for name in ("feature", "roots", "counts"))
        if len(nodes) > MOST_NODES or len(trees) > MOST_TREES:
            raise LearningError(
                f"{len(trees)} trees of {len(nodes)} nodes are too many; at most {MOST_TREES} trees of {MOST_NODES} "
                "nodes are read: train with fewer trees (n_trees), or smaller ones (n_leaves)"
            )
        if not (counts > 0).all() or counts.sum(dtype=np.int64) != len(trees):
            raise LearningError(f"{len(trees)} trees are no sum of {counts[:8].tolist()} trees a model")
        if trees[0] != 0 or not (np.diff(trees) > 0).all() or trees[-1] >= len(nodes):
            raise LearningError("the roots of the trees must ascend from 0 and lie among the nodes")

    def _check_nodes(self, is_leaf: NDArray[np.bool_], wide: Mapping[str, Ints]) -> None:
        feature, left, right, roots = (wide[name] for name in ("feature", "left", "right", "roots"))
        if not ((feature >= LEAF) & (feature < self.n_features)).all():
            raise LearningError(f"a feature of a tree lies outside the vector of {self.n_features} features")
        own, ends = np.arange(len(feature)), np.repeat([*roots[1:], len(feature)], np.diff([*roots, len(feature)]))
        inside = [np.where(is_leaf, side == LEAF, (side > own) & (side < ends)) for side in (left, right)]
        if not (inside[0] & inside[1]).all():
            raise LearningError("a child of a node must come after the node in the same tree, and a leaf has none")
        reached = np.bincount(np.concatenate([left[~is_leaf], right[~is_leaf]]), minlength=len(feature))
        reached[roots] += 1
        if not (reached == 1).all():
            raise LearningError("every node of a tree but its root must be the child of one other node")
        if not np.isfinite(self.arrays["threshold"]).all() or not (np.abs(self.arrays["value"]) <= LARGEST_VALUE).all():
            raise LearningError(f"thresholds must be finite, and values of leaves at most {LARGEST_VALUE:g} from 0")

    def _depths(self, is_leaf: NDArray[np.bool_], wide: Mapping[str, Ints]) -> Ints:
        """Depth of each tree [T]; every node must have one parent."""
        tree_of = np.repeat(np.arange(len(wide["roots"])), np.diff([*wide["roots"], len(is_leaf)]))
        depths, level = np.zeros(len(wide["roots"]), dtype=np.int64), wide["roots"]
        for depth in range(MOST_DEPTH + 1):
            level = level[~is_leaf[level]]
            if not len(level):
                return depths
            depths[tree_of[level]] = depth + 1
            level = np.concatenate([wide["left"][level], wide["right"][level]])
        raise LearningError(f"a tree has a depth of more than {MOST_DEPTH}; train with smaller ones (n_leaves)")


def _tree(text: str) -> dict[str, NDArray[Any]]:
    """The nodes of one tree: its decisions as LightGBM numbers them, then its leaves."""
    entries = dict(line.split("=", 1) for line in text.splitlines() if "=" in line)
    decisions = np.array(entries["decision_type"].split(), dtype=np.int64)
    # Bit 0: by category; bits 2 and 3: what stands for a missing value. Features are finite numbers, so neither occurs.
    if (decisions & 0b1101).any() or entries.get("is_linear", "0") != "0" or entries["num_cat"] != "0":
        raise LearningError("LightGBM made a tree with other than numeric decisions and constant leaves")
    values = np.array(entries["leaf_value"].split(), dtype=np.float64)
    n_inner, n_leaves = len(decisions), len(values)
    tree: dict[str, NDArray[Any]] = {}
    for name in ("left", "right"):
        child = np.array(entries[f"{name}_child"].split(), dtype=np.int64)
        tree[name] = np.concatenate([np.where(child < 0, n_inner + ~child, child), np.full(n_leaves, LEAF)])
    feature = np.array(entries["split_feature"].split(), dtype=np.int64)
    tree["feature"] = np.concatenate([feature, np.full(n_leaves, LEAF)])
    tree["threshold"] = np.concatenate([np.array(entries["threshold"].split(), dtype=np.float64), np.zeros(n_leaves)])
    tree["value"] = np.concatenate([np.zeros(n_inner), values])
    return tree


def _sigmoid(logits: Doubles) -> Doubles:
    """By the C library's `exp`, as LightGBM: numpy's may differ in the last bit."""
    odds = [math.exp(-logit) for logit in np.clip(logits, -700, 700).reshape(-1).tolist()]
    return 1 / (1 + np.array(odds, dtype=np.float64).reshape(logits.shape))


class LightGBMController(Controller):
    """Boosted trees, one model for each plan or one for all plans.

    Learns by cross-entropy. One model for all plans has rows (features, plan budget) and a monotone constraint: the
    expected loss never grows with the budget, which reduces noise where the menu is nested.

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
