"""Prompts that are no independent draws: those of one group count as one, with their mean.

Shapes: `T` candidate prices, `n` calibration prompts, `G` groups of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from controller.certificate.p_values import CalibrationError
from controller.certificate.risks import Risk

Floats = NDArray[np.float64]
Names = Sequence[Any] | NDArray[Any]
"""One name a prompt, of its task or of its group."""


def of_groups(
    losses: Floats, risk: Risk, groups: Names | None, tasks: Names | None = None, full: Floats | None = None
) -> tuple[Floats, Risk, Names | None, Floats | None]:
    """Losses, the risk to test, tasks and full scores, with the mean of each group in place of its prompts.

    A bet on a group's mean is one on an independent draw, while bets on its prompts win and lose together. The tested
    mean counts each group once, whatever its size. A group of several tasks is one group in each. Groups come in the
    order of their first prompts. Means of counts are no counts, so that `insufficient` is tested as `score_lost`.

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
    order, starts, seen = np.argsort(places, kind="stable"), np.cumsum(sizes) - sizes, np.argsort(first)

    def means(values: Floats) -> Floats:
        return np.asarray((np.add.reduceat(values[..., order], starts, axis=-1) / sizes)[..., seen])

    return (
        means(losses),
        "score_lost" if risk == "insufficient" else risk,
        None if tasks is None else np.asarray(tasks)[np.sort(first)],
        None if full is None else means(full),
    )
