"""Stage 2: the label of every prompt under every plan."""

from __future__ import annotations

from pathlib import Path

from pipelines.config import Config
from pipelines.progress import progress
from pipelines.workspace import Workspace


def run(config: Config) -> Path:
    """Fill `labels.db` with what is missing there."""
    workspace = Workspace.of(config)
    menu, labeller = workspace.menu(), workspace.labeller
    missing = sum(len(labeller.missing(workspace.prompts, plan)) for plan in menu.plans)
    with progress("labels", missing) as advance:
        labeller.label(workspace.prompts, menu, advance)
    return workspace.path("labels.db")
