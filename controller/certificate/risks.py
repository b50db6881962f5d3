"""The quantities that can be bounded, and how much of each a plan keeps.

Shapes: `N` prompts, `K` plans, cheapest first, the last full.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

Risk = Literal["mean_score", "score_lost", "insufficient"]
"""The loss of a prompt. `mean_score`: full model's score - score, in [-1, 1], so that prompts that win make up for
prompts that lose; its mean is given in shares of the full model's mean score. `score_lost`: max(0, full model's score -
score), in [0, 1]. `insufficient`: 1 where the plan's answer is no longer sufficient, else 0."""
RISKS: tuple[Risk, ...] = get_args(Risk)
MOST_KEPT = 10.0
"""A bound asks for less than so many times the full model's mean score."""


def quality_kept(risk: Risk, scores: Floats, sufficient: NDArray[np.bool_]) -> Floats:
    """[N, K]: what each plan keeps, on the scale from 0 to 1 that controllers learn; `controller.base.lost` gives the
    loss. Under `mean_score` the full plan keeps 1/2, under the others 1.

    Args:
        risk: the quantity that is bounded.
        scores: under each plan [N, K].
        sufficient: whether each plan is sufficient [N, K].
    """
    if risk == "insufficient":
        return sufficient.astype(np.float64)
    if risk == "mean_score":
        return np.asarray((1.0 + scores - scores[:, -1:]) / 2)
    return 1.0 - np.clip(scores[:, -1:] - scores, 0.0, 1.0)


def kept_by_full(risk: Risk) -> float:
    """What the full plan keeps in `quality_kept`."""
    return 0.5 if risk == "mean_score" else 1.0


def unit_of(risk: Risk, full: Floats) -> float:
    """What a mean loss is divided by: for `mean_score` the full model's mean score over its scores [N], so that the
    loss is a share of it (and a loss in scores where that is 0); 1 for the others."""
    return (float(full.mean()) or 1.0) if risk == "mean_score" else 1.0
