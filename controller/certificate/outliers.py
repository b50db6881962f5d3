"""Conformal outlier test: a prompt unlike all training prompts runs the full model.

The score of a prompt is its distance to the nearest prompt of the split `train`. The threshold comes from the scores of
the split `tune`, before calibration, so the certificate covers the test.

Shapes: `N` prompts, `n` held-out prompts, `R` references, `F` projected features.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from backbone.strict_json import parse
from controller.base import Floats, LearningError, check_sets
from controller.features import ARRAYS, Features, Projection

COMPONENTS = 12
"""Principal components in which distances are taken, each scaled to variance 1; measured in `docs/controllers.md`."""
LARGEST_DISTANCE, MOST_HELD = 1e9, 10**9
"""Upper limits of the threshold and of the number of held-out prompts in a file."""
MOST_REFERENCES = 4000
"""References kept; a larger sample of them makes each test slower."""


@dataclass(frozen=True, slots=True)
class OutlierTest:
    """Tells whether a prompt is unlike all references.

    At most a share `rate` of ordinary prompts is called an outlier, on average over draws of the held-out prompts.
    Ordinary prompts are exchangeable with the held-out ones, as independent draws from one population are.

    Source: Vovk, Gammerman and Shafer 2005, Algorithmic Learning in a Random World, section 2.2, with the split of
    Papadopoulos et al. 2002 (inductive conformal prediction); distances to neighbours as scores: Laxhammar and Falkman
    2010.

    Attributes:
        projection: fitted on the references alone.
        references: projected features [R, F].
        threshold: distance above which a prompt is an outlier; inf where the held-out prompts are too few for the rate.
        rate: share of ordinary prompts that may be called outliers, in (0, 1).
        held: number of held-out prompts.
    """

    projection: Projection
    references: Floats
    threshold: float
    rate: float
    held: int

    @classmethod
    def fit(
        cls, references: Features, held: Features, sets: Sequence[str], rate: float, n_components: int = COMPONENTS
    ) -> OutlierTest:
        """Fit on the features of training prompts [R] and of held-out prompts [n]; `sets` are the features compared."""
        projection = Projection.fit(references, sets, n_components)
        known = projection(references)
        if len(known) > MOST_REFERENCES:
            known = known[np.random.default_rng(0).choice(len(known), MOST_REFERENCES, replace=False)]
        n = len(next(iter(held.values())))
        unset = cls(projection, np.ascontiguousarray(known), math.inf, rate, n)
        scores, rank = np.sort(unset.scores(held)), _rank(rate, n)
        return replace(unset, threshold=min(float(scores[rank - 1]), LARGEST_DISTANCE)) if rank <= n else unset

    def scores(self, features: Features) -> NDArray[np.float64]:
        """Distance to the nearest reference [N]; inf where a feature is not finite."""
        rows = self.projection(features).astype(np.float64)
        finite = np.asarray(np.isfinite(rows).all(axis=1))
        rows = np.where(finite[:, None], rows, 0.0)
        known = self.references.astype(np.float64)
        squares = (rows**2).sum(1)[:, None] + (known**2).sum(1) - 2 * rows @ known.T
        return np.where(finite, np.sqrt(np.maximum(squares.min(axis=1), 0.0)), np.inf)

    def are_outliers(self, features: Features) -> NDArray[np.bool_]:
        """Whether each prompt is unlike all references [N]."""
        return self.scores(features) > self.threshold

    @property
    def description(self) -> str:
        """The test in a sentence."""
        if math.isinf(self.threshold):
            return f"off: {self.held} prompts of the split tune are too few for a rate of {self.rate:g}"
        return (
            f"a prompt runs the full model if its distance to the nearest of {len(self.references)} training prompts "
            f"exceeds that of {100 * (1 - self.rate):g}% of {self.held} held-out prompts"
        )

    def save(self, path: Path) -> None:
        arrays = {**self.projection.arrays, "references": self.references, "threshold": np.array([self.threshold])}
        about = {"sets": self.projection.sets, "rate": self.rate, "held": self.held}
        save_file(arrays, path, {"test": json.dumps(about)})

    @classmethod
    def load(cls, path: Path) -> OutlierTest:
        """Raises LearningError for a file that `save` did not write."""
        try:
            with safe_open(path, "numpy") as file:
                about = parse((file.metadata() or {})["test"])
                arrays = {name: file.get_tensor(name) for name in (*ARRAYS, "references", "threshold")}
            sets, rate, held = tuple(about["sets"]), about["rate"], about["held"]
            check_sets(sets)
            projection = Projection.of_arrays(path, sets, arrays)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise LearningError(f"{path} holds no outlier test: {error}") from None
        references, threshold = arrays["references"], arrays["threshold"]
        # An infinite threshold is right only where the held-out prompts are too few for the rate.
        found = threshold.item() if threshold.shape == (1,) and threshold.dtype == np.float64 else math.nan
        fits = references.ndim == 2 and references.shape[1] == projection.n_features and len(references) > 0
        is_share = type(rate) is float and 0 < rate < 1 and type(held) is int and 0 <= held <= MOST_HELD
        checks = {
            "its references are not finite float32 rows as wide as its projection": fits
            and references.dtype == np.float32
            and bool(np.isfinite(references).all()),
            f"its rate is {rate!r:.40}, not in (0, 1), or its number of prompts {held!r:.40}, not an integer from 0 to "
            f"{MOST_HELD}": is_share,
            f"its threshold is {found:g}, not a distance from 0 to {LARGEST_DISTANCE:g}": 0 <= found <= LARGEST_DISTANCE
            or (found == math.inf and is_share and _rank(rate, held) > held),
        }
        if wrong := [reason for reason, right in checks.items() if not right]:
            raise LearningError(f"{path} holds no outlier test: {wrong[0]}")
        return cls(projection, references, found, rate, held)


def _rank(rate: float, held: int) -> int:
    """Rank of the threshold among the sorted held-out scores, from 1; above `held` where they are too few."""
    return math.ceil((1 - rate) * (held + 1))
