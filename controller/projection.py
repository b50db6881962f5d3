"""Projection of features for controllers: standardised, wide sets reduced to principal components."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from controller.base import WIDE, LearningError, check_sets
from controller.features import Features, Floats

LEAST_VARIANCE = 1e-4
ARRAYS = ("mean", "scale", "components")
"""The saved arrays of a projection."""


@dataclass(frozen=True, slots=True)
class Projection:
    """A projection fitted on training prompts, saved with the allocator.

    Attributes:
        sets: the sets of features that it reads, in order.
        mean: of each raw feature [F].
        scale: standard deviation of each raw feature, 1 where it is constant.
        wide: number of leading raw features that the components reduce; the others stay.
        components: [C, wide], each divided by the standard deviation of the training prompts along it. Variances
            count as at least `LEAST_VARIANCE` of the first one: less is mostly rounding.
    """

    sets: tuple[str, ...]
    mean: Floats
    scale: Floats
    wide: int
    components: Floats

    @classmethod
    def fit(cls, features: Features, sets: Sequence[str], n_components: int) -> Projection:
        """Fit on N training prompts, with at most N - 1 components, none without wide sets.

        Raises:
            LearningError: features that are not finite, or the same for all prompts.
        """
        from sklearn.decomposition import PCA

        ordered = tuple(sorted(sets, key=lambda name: name not in WIDE))
        raw = _joined(features, ordered)
        _check(raw, ordered)
        mean, scale = raw.mean(0), raw.std(0)
        scale = np.where(scale > 1e-6, scale, 1.0).astype(np.float32)
        wide = sum(features[name].shape[1] for name in ordered if name in WIDE)
        components = np.zeros((0, 0), dtype=np.float32)
        if wide:
            states = ((raw - mean) / scale)[:, :wide]
            pca = PCA(min(n_components, len(raw) - 1, wide), random_state=0).fit(states)
            variance = pca.explained_variance_
            spread = np.sqrt(np.maximum(variance, max(LEAST_VARIANCE * variance[0], 1e-12)))
            components = (pca.components_ / spread[:, None]).astype(np.float32)
        return cls(ordered, mean, scale, wide, np.ascontiguousarray(components))

    def __call__(self, features: Features) -> Floats:
        """Projected features [N, C + narrow] of N prompts."""
        standardised = (_joined(features, self.sets) - self.mean) / self.scale
        states, narrow = standardised[:, : self.wide], standardised[:, self.wide :]
        return np.concatenate([states @ self.components.T, narrow], axis=1) if self.wide else narrow

    def first(self, n_components: int) -> Projection:
        """The same with at most so many components."""
        return replace(self, components=np.ascontiguousarray(self.components[:n_components]))

    @property
    def arrays(self) -> dict[str, Floats]:
        """`ARRAYS`, to be saved."""
        return {name: np.ascontiguousarray(getattr(self, name)) for name in ARRAYS}

    def save(self, path: Path) -> None:
        # One entry of metadata: the library writes several in an order that changes from process to process.
        save_file(self.arrays, path, {"sets": json.dumps(self.sets)})

    @property
    def n_features(self) -> int:
        """Number of projected features."""
        return len(self.components) * bool(self.wide) + len(self.mean) - self.wide

    @classmethod
    def load(cls, path: Path) -> Projection:
        """Raises LearningError for a file that `save` did not write."""
        try:
            with safe_open(path, "numpy") as file:
                sets = tuple(json.loads((file.metadata() or {})["sets"]))
                arrays = {name: file.get_tensor(name) for name in ARRAYS}
            check_sets(sets)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise LearningError(f"{path} holds no projection: {error}") from None
        return cls.of_arrays(path, sets, arrays)

    @classmethod
    def of_arrays(cls, path: Path, sets: tuple[str, ...], arrays: dict[str, Floats]) -> Projection:
        """From `arrays`, read from a file; raises LearningError where they do not fit."""
        mean, scale, components = (arrays[name] for name in ARRAYS)
        fits = mean.ndim == 1 and scale.shape == mean.shape and components.ndim == 2
        if not fits or components.shape[1] > len(mean) or any(a.dtype != np.float32 for a in (mean, scale, components)):
            raise LearningError(
                f"{path} holds no projection: mean {mean.shape}, scale {scale.shape} and components {components.shape} "
                "do not fit, or are not float32"
            )
        if not all(np.isfinite(array).all() for array in (mean, scale, components)) or not (scale > 0).all():
            raise LearningError(f"{path} holds no projection: a number is not finite, or a scale not above 0")
        return cls(sets, mean, scale, components.shape[1], components)


def _joined(features: Features, sets: Sequence[str]) -> Floats:
    return np.concatenate([features[name] for name in sets], axis=1)


def _check(raw: Floats, sets: Sequence[str]) -> None:
    if bad := int((~np.isfinite(raw).all(axis=1)).sum()):
        raise LearningError(
            f"{bad} of {len(raw)} prompts have features that are not finite: the first layers overflow on them; "
            "leave them out, or load the model in bfloat16 or float32"
        )
    if not (raw.std(0) > 1e-6).any():
        raise LearningError(
            f"all {len(raw)} prompts have the same features ({', '.join(sets)}), so nothing tells them apart"
        )
