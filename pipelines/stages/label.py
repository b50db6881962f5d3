"""Stage 3: the labels of the prompts to train, to tune and to test, under every plan."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from oracle.labels.labeller import Labeller
from oracle.prompts import Shard, Split
from pipelines.config import Config
from pipelines.ray.distributed import Workers
from pipelines.ray.remote_labels import DistantLabeller, distant_labeller
from pipelines.run.progress import say
from pipelines.run.workspace import IN_FULL, Workspace
from pipelines.stages.labelling import by_plan, fill


def run(config: Config, shard: Shard | None = None, workers: Workers | None = None) -> Path:
    """Fill `labels.db` with what is missing there, or, of that, with the labels of one shard."""
    workspace = Workspace.of(config)
    prompts = workspace.labelled_of(*IN_FULL) if shard is None else shard.select(workspace.labelled_of(*IN_FULL))
    labeller = _labeller(workspace, workers)
    if config.label.shortcut and (options := labeller.decoding.changes_tokens):
        named = ", ".join(f"{name}={value}" for name, value in options.items())
        say(f"  label.shortcut steps aside: with {named} the likeliest token is not the one chosen")
    fill(labeller, dict.fromkeys(workspace.menu().plans, prompts), "labels")
    return workspace.path("labels.db")


def label_cells(workspace: Workspace, split: Split, cells: NDArray[np.bool_], workers: Workers | None) -> None:
    """Label the N prompts of a split under some of K plans [N, K]; loads no model where nothing is missing."""
    wanted = by_plan(workspace.labelled_splits[split], workspace.menu().plans, cells)
    if any(workspace.labels.missing(some, plan) for plan, some in wanted.items()):
        fill(_labeller(workspace, workers), wanted, f"labels to {split}")


def _labeller(workspace: Workspace, workers: Workers | None) -> Labeller | DistantLabeller:
    """Of the adapted model; only where this process labels does it load one."""
    return workspace.labeller if workers is None else distant_labeller(workspace, workers, workspace.healing)
