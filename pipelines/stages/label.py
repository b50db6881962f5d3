"""Stage 3: the labels of the prompts to train, to tune and to test, under every plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from backbone.plan import LayerPlan
from oracle.labels.labeller import Labeller
from oracle.prompts import Prompt, Shard, Split
from pipelines.ray.distributed import Workers
from pipelines.ray.remote_work import RemoteLabeller, remote_labeller
from pipelines.run.progress import progress, say, say_failures
from pipelines.run.prompts import IN_FULL
from pipelines.run.workspace import Workspace, by_plan


def run(workspace: Workspace, shard: Shard | None = None, workers: Workers | None = None) -> Path:
    """Fill `labels.db` with what is missing there, or, of that, with the labels of one shard."""
    prompts = workspace.prompts.labelled(*IN_FULL)
    labeller = _labeller(workspace, workers)
    if workspace.config.label.verify and (options := labeller.decoding.changes_tokens):
        named = ", ".join(f"{name}={value}" for name, value in options.items())
        say(f"  label.verify steps aside: with {named} the likeliest token is not the one chosen")
    some = prompts if shard is None else shard.select(prompts)
    fill(labeller, dict.fromkeys(workspace.menu().plans, some), "labels")
    return workspace.path("labels.db")


def label_cells(workspace: Workspace, split: Split, cells: NDArray[np.bool_], workers: Workers | None) -> None:
    """Label the N prompts of a split under some of K plans [N, K]; loads no model where nothing is missing."""
    wanted = by_plan(workspace.prompts.labelled(split), workspace.menu().plans, cells)
    if any(workspace.labels.missing(some, plan) for plan, some in wanted.items()):
        fill(_labeller(workspace, workers), wanted, f"labels to {split}")


def _labeller(workspace: Workspace, workers: Workers | None) -> Labeller | RemoteLabeller:
    """Of the healed model; only where this process labels does it load one."""
    if workers is None:
        return workspace.labeller(workspace.healing)
    return remote_labeller(workspace, workers, workspace.healing)


def fill(labeller: Labeller | RemoteLabeller, wanted: Mapping[LayerPlan, Sequence[Prompt]], title: str) -> None:
    """Make the labels that are not there, and name what judges failed on. Resumable.

    Args:
        labeller: makes them.
        wanted: prompts by the plan that they are to be labelled under; the full plan comes last.
        title: of the progress bar.
    """
    before = len(labeller.failures)
    with progress(title, sum(len(labeller.missing(some, plan)) for plan, some in wanted.items())) as advance:
        labeller.label_in_blocks(wanted, list(wanted)[-1], advance)
    say_failures(labeller.failures[before:])
