"""Stage 1: the menu of plans."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from backbone.families import decoder_layers
from backbone.files import write_atomically
from backbone.plan import LayerPlan
from oracle.batches import spread
from oracle.menus import build_menu, search_steps
from oracle.menus.base import MenuTask, TaskLabels
from oracle.prompts import Prompt
from pipelines.config import Config
from pipelines.run.progress import progress
from pipelines.run.workspace import Workspace


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
    prompts, others = _parts(workspace.splits["adapt"], settings.prompts)
    full = LayerPlan.full(len(decoder_layers(model)))
    return MenuTask(
        model=model,
        tokenizer=tokenizer,
        prompts=[prompt.prompt for prompt in prompts],
        decoding=workspace.decoding,
        probe_depth=settings.probe_depth,
        n_plans=settings.plans,
        cheapest_budget=settings.cheapest_budget,
        losses=settings.losses,
        given=settings.given,
        labels=TaskLabels(cache(lambda: workspace.labeller_of(model, tokenizer)), tokenizer, prompts, others, full),
    )


def _parts(prompts: Sequence[Prompt], wanted: int) -> tuple[list[Prompt], list[Prompt]]:
    """The prompts that a search looks at, half of them at most, and the others."""
    looked_at = spread(prompts, max(1, min(wanted, len(prompts) // 2)))
    known = set(looked_at)
    return looked_at, [prompt for prompt in prompts if prompt not in known]
