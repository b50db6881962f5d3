"""A prompt unlike all that were learned from runs the full model: a conformal outlier test.

How far a prompt lies from the nearest prompt of the split `train` is compared with how far the prompts of the split
`tune` lie, which the scorer has not seen. Nothing else about the prompts is used, so that the decision is made before
calibration and the certificate covers it.

Shapes: `N` prompts, `n` held prompts, `R` references, `F` projected features.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from backbone.strict_json import parse
from controller.base import LearningError
from controller.feature_sets import check_sets
from controller.features import Features, Floats
from controller.projection import ARRAYS, Projection

COMPONENTS = 12
"""Principal components in which distances are taken. Chosen by measurement, `docs/controllers.md`: with more of them,
each scaled to variance 1, what hardly varies counts as much as what tells kinds of prompts apart."""

LARGEST_DISTANCE, MOST_HELD = 1e9, 10**9
"""No threshold and no number of held prompts is larger; features have a standard deviation of about 1."""

MOST_REFERENCES = 4000
"""More of them take longer to look through than they are worth."""


@dataclass(frozen=True, slots=True)
class OutlierTest:
    """Says of a prompt whether it is unlike all references.

    Of prompts that are exchangeable with the held ones (independent draws from one population are) it sends at most a
    share `rate` to the full plan, on average over draws of the held prompts; about as many where these are many. Of
    other prompts it sends more, the less they are like the references.

    Source: Vovk, Gammerman and Shafer 2005, Algorithmic Learning in a Random World, section 2.2, with the split of
    Papadopoulos et al. 2002 (inductive conformal prediction); distances to neighbours as scores: Laxhammar and Falkman
    2010.

    Attributes:
        projection: fitted on the references alone.
        references: projected features [R, F].
        threshold: scores above it are those of outliers; inf where there are too few held prompts for the rate.
        rate: share of prompts like the held ones that may be taken for outliers, in (0, 1).
        held: how many prompts the threshold was made from.
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
        """From some sets of features of prompts that were learned from [R] and of others that are like them [n]."""
        projection = Projection.fit(references, sets, n_components)
        known = projection(references)
        if len(known) > MOST_REFERENCES:
            known = known[np.random.default_rng(0).choice(len(known), MOST_REFERENCES, replace=False)]
        n = len(next(iter(held.values())))
        unfinished = cls(projection, np.ascontiguousarray(known), math.inf, rate, n)
        scores, rank = np.sort(unfinished.scores(held)), _rank(rate, n)
        threshold = min(float(scores[rank - 1]), LARGEST_DISTANCE) if rank <= n else math.inf
        return cls(projection, unfinished.references, threshold, rate, n)

    def scores(self, features: Features) -> NDArray[np.float64]:
        """[N]: distance to the nearest reference; inf where a feature is not finite."""
        rows = self.projection(features).astype(np.float64)
        finite = np.asarray(np.isfinite(rows).all(axis=1))
        rows = np.where(finite[:, None], rows, 0.0)
        known = self.references.astype(np.float64)
        squares = (rows**2).sum(1)[:, None] + (known**2).sum(1) - 2 * rows @ known.T
        return np.where(finite, np.sqrt(np.maximum(squares.min(axis=1), 0.0)), np.inf)

    def are_outliers(self, features: Features) -> NDArray[np.bool_]:
        """[N]: whether each prompt is unlike all references."""
        return self.scores(features) > self.threshold

    @property
    def description(self) -> str:
        """What it does, in a sentence."""
        if math.isinf(self.threshold):
            return f"none can be told: {self.held} prompts of the split tune are too few for a share of {self.rate:g}"
        return (
            f"a prompt that lies farther from all of {len(self.references)} known ones than {1 - self.rate:.3g} of "
            f"{self.held} others do runs the full model"
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
        fits = references.ndim == 2 and references.shape[1] == projection.n_features and len(references) > 0
        if not fits or references.dtype != np.float32 or not np.isfinite(references).all():
            raise LearningError(f"{path} holds no outlier test: its references are not numbers that fit its projection")
        if type(rate) is not float or not 0 < rate < 1 or type(held) is not int or not 0 <= held <= MOST_HELD:
            raise LearningError(f"{path} holds no outlier test: {rate!r:.40} of {held!r:.40} prompts is no share")
        # None can be told, and the threshold is infinite, only where the held prompts are too few.
        found = threshold.item() if threshold.shape == (1,) and threshold.dtype == np.float64 else math.nan
        if not 0 <= found <= LARGEST_DISTANCE and not (found == math.inf and _rank(rate, held) > held):
            raise LearningError(
                f"{path} holds no outlier test: its threshold is no distance up to {LARGEST_DISTANCE:g}, got {found:g}"
            )
        return cls(projection, references, found, rate, held)


def _rank(rate: float, held: int) -> int:
    """Place of the threshold among the sorted scores of the held prompts, from 1."""
    return math.ceil((1 - rate) * (held + 1))
