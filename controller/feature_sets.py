"""The names of the sets of features; `controller.features` computes them. Loads no torch."""

from __future__ import annotations

from collections.abc import Sequence

from backbone.errors import InputError

NAMES = ("length", "tokens", "embedding", "states", "windows", "path", "lens")
WIDE = ("embedding", "states", "windows")
"""Sets as wide as the hidden size, of which controllers see principal components."""


class FeatureError(InputError):
    """An unknown set of features, or one that this model cannot give."""


def check_sets(sets: Sequence[str]) -> None:
    """Raises FeatureError for names that are no sets of features."""
    if unknown := [name for name in sets if name not in NAMES]:
        raise FeatureError(f"unknown features {unknown[0]!r}; known are {', '.join(NAMES)}")
