"""Label what is missing, with progress, and name what judges failed on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from backbone.plan import LayerPlan
from oracle.labels.labeller import Labeller
from oracle.prompts import Prompt
from pipelines.run.progress import progress, say_failures

if TYPE_CHECKING:
    from pipelines.ray.remote_labels import DistantLabeller

Wanted = Mapping[LayerPlan, Sequence[Prompt]]
"""Prompts by the plan that they are to be labelled under; the full plan comes last."""


def fill(labeller: Labeller | DistantLabeller, wanted: Wanted, title: str) -> None:
    """Make the labels that are wanted and not there; a stopped call goes on where it was."""
    before = len(labeller.failures)
    with progress(title, sum(len(labeller.missing(some, plan)) for plan, some in wanted.items())) as advance:
        labeller.label_in_blocks(wanted, list(wanted)[-1], advance)
    say_failures(labeller.failures[before:])


def by_plan(prompts: Sequence[Prompt], plans: Sequence[LayerPlan], cells: NDArray[np.bool_]) -> Wanted:
    """The prompts that are to be labelled under each plan, from a mask [N, K]."""
    rows = [np.flatnonzero(own).tolist() for own in cells.T]
    return {plan: [prompts[row] for row in own] for plan, own in zip(plans, rows, strict=True)}
