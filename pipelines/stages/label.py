"""Stage 3: the label of every prompt under every plan."""

from __future__ import annotations

from pathlib import Path

from oracle.labels.labeller import Labeller
from oracle.prompts import Shard
from pipelines.config import Config
from pipelines.distant_labels import DistantLabeller, distant_labeller
from pipelines.distributed import Workers
from pipelines.progress import progress, say, say_failures
from pipelines.workspace import Workspace


def run(config: Config, shard: Shard | None = None, workers: Workers | None = None) -> Path:
    """Fill `labels.db` with what is missing there, or, of that, with the labels of one shard."""
    workspace = Workspace.of(config)
    prompts = workspace.labelled if shard is None else shard.select(workspace.labelled)
    menu, labeller = workspace.menu(), _labeller(workspace, workers)
    missing = sum(len(labeller.missing(prompts, plan)) for plan in menu.plans)
    if config.label.shortcut and (options := labeller.decoding.changes_tokens):
        named = ", ".join(f"{name}={value}" for name, value in options.items())
        say(f"  label.shortcut steps aside: with {named} the likeliest token is not the one chosen")
    with progress("labels", missing) as advance:
        labeller.label(prompts, menu, advance)
    say_failures(labeller.failures)
    return workspace.path("labels.db")


def _labeller(workspace: Workspace, workers: Workers | None) -> Labeller | DistantLabeller:
    """Of the adapted model; only where this process labels does it load one."""
    return workspace.labeller if workers is None else distant_labeller(workspace, workers, workspace.stand_ins)
