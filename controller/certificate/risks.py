"""Risks: losses that can be bounded, and their group means.

Shapes: `N` or `n` prompts, `K` plans, cheapest first, the last full, `T` candidate prices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from backbone.errors import InputError

Floats = NDArray[np.float64]
Names = Sequence[Any] | NDArray[Any]
"""One name a prompt, of its task or of its group."""

Risk = Literal["mean_score", "score_lost", "insufficient"]
"""The loss of a prompt. `mean_score`: full model's score - score, in [-1, 1], so that gains offset losses; its mean is
given in shares of the full model's mean score. `score_lost`: max(0, full model's score - score), in [0, 1].
`insufficient`: 1 where the plan's answer is no longer sufficient, else 0."""
RISKS: tuple[Risk, ...] = get_args(Risk)
MOST_KEPT = 10.0
"""A bound asks for less than so many times the full model's mean score."""


class CalibrationError(InputError):
    """Losses, numbers or a file unfit for a certificate or an alarm."""


def plan_losses(risk: Risk, scores: Floats, sufficient: NDArray[np.bool_]) -> Floats:
    """Loss of each plan [N, K], in [-1, 1]; the full plan's is 0.

    Args:
        risk: the loss that is bounded.
        scores: under each plan [N, K].
        sufficient: whether each plan is sufficient [N, K].
    """
    if risk == "insufficient":
        return (~sufficient).astype(np.float64)
    lost = scores[:, -1:] - scores
    return lost if risk == "mean_score" else np.clip(lost, 0.0, 1.0)


def loss_scale(risk: Risk, full: Floats) -> float:
    """Divisor of a mean loss: the mean full score [N] for `mean_score`, 1 otherwise or for 0."""
    return (float(full.mean()) or 1.0) if risk == "mean_score" else 1.0


def group_means(
    losses: Floats, risk: Risk, groups: Names | None, tasks: Names | None = None, full: Floats | None = None
) -> tuple[Floats, Risk, Names | None, Floats | None]:
    """Replace prompts by group means: losses, the risk to test, tasks, full scores.

    Prompts of one group are no independent draws, their means are. Each group counts once, whatever its size; a group
    of several tasks is one group in each. Groups come in the order of their first prompts. Means of counts are no
    counts, so `insufficient` is tested as `score_lost`.

    Args:
        losses: of the prompts at each price [T, n].
        risk: which loss.
        groups: group of each prompt [n]; None where each prompt is a group of its own.
        tasks: task of each prompt [n], where each task is tested by itself.
        full: the full model's scores [n], for `mean_score`.

    Raises:
        CalibrationError: not one group for each prompt.
    """
    if groups is None:
        return losses, risk, tasks, full
    keys = np.unique(np.asarray(groups), return_inverse=True)[1]
    if keys.shape != losses.shape[1:]:
        raise CalibrationError(f"{len(keys)} groups were given for {losses.shape[1]} prompts; give one for each prompt")
    if tasks is not None:
        keys = keys + len(keys) * np.unique(np.asarray(tasks), return_inverse=True)[1]
    _, first, places, sizes = np.unique(keys, return_index=True, return_inverse=True, return_counts=True)
    if len(sizes) == len(keys):
        return losses, risk, tasks, full
    order, starts, by_first = np.argsort(places, kind="stable"), np.cumsum(sizes) - sizes, np.argsort(first)

    def means(values: Floats) -> Floats:
        return np.asarray((np.add.reduceat(values[..., order], starts, axis=-1) / sizes)[..., by_first])

    return (
        means(losses),
        "score_lost" if risk == "insufficient" else risk,
        None if tasks is None else np.asarray(tasks)[np.sort(first)],
        None if full is None else means(full),
    )
