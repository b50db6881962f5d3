"""Stage 1: the menu of plans."""

from __future__ import annotations

import json
from pathlib import Path

from backbone.files import write_atomically
from oracle.menus import build_menu
from oracle.menus.base import MenuTask
from oracle.menus.greedy import search_steps
from pipelines.config import Config
from pipelines.progress import progress
from pipelines.workspace import Workspace


def run(config: Config) -> Path:
    """Search the plans with a few prompts of the split `adapt`; writes `menu.json`."""
    workspace = Workspace.of(config)
    task, settings = menu_task(workspace), config.menu
    with progress("plans tried", search_steps(settings.method, task)) as advance:
        menu = build_menu(settings.method, task, lambda: advance(1))
    write_atomically(workspace.path("menu.json"), json.dumps(menu.to_json(), indent=2) + "\n")
    return workspace.path("menu.json")


def menu_task(workspace: Workspace) -> MenuTask:
    """What the menu is made for."""
    (model, tokenizer), settings = workspace.backbone, workspace.config.menu
    return MenuTask(
        model=model,
        tokenizer=tokenizer,
        prompts=[prompt.prompt for prompt in workspace.splits["adapt"][:: _stride(workspace, settings.prompts)]],
        decoding=workspace.decoding,
        probe_depth=settings.probe_depth,
        n_plans=settings.plans,
        cheapest_budget=settings.cheapest_budget,
        given=settings.given,
    )


def _stride(workspace: Workspace, wanted: int) -> int:
    """Prompts lie in the source's order, often by task: take every n-th to see all kinds."""
    return max(1, len(workspace.splits["adapt"]) // wanted)
