"""Stage 1: the menu of plans."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from backbone.families import decoder_layers
from backbone.plan import LayerPlan
from oracle.batches import spread
from oracle.menus import build_menu, search_steps
from oracle.menus.base import MenuTask, TaskLabels
from oracle.prompts import Prompt, check_lengths
from pipelines.run.progress import progress
from pipelines.run.workspace import Workspace


def run(workspace: Workspace) -> Path:
    """Search the plans with a few prompts of the split `adapt`; writes `menu.json`."""
    named = [(prompt.id, prompt.prompt) for prompt in workspace.prompts.rendered]
    check_lengths(*workspace.model.loaded, named, workspace.config.decoding.max_new_tokens)
    task, method = menu_task(workspace), workspace.config.menu.method
    with progress("plans tried", search_steps(method, task)) as advance:
        menu = build_menu(method, task, lambda: advance(1))
    return workspace.write("menu.json", menu.to_json())


def menu_task(workspace: Workspace) -> MenuTask:
    """What the menu is made for."""
    (model, tokenizer), settings = workspace.model.loaded, workspace.config.menu
    prompts, others = _parts(workspace.prompts.splits["adapt"], settings.prompts)
    full = LayerPlan.full(len(decoder_layers(model)))
    return MenuTask(
        model=model,
        tokenizer=tokenizer,
        prompts=[prompt.prompt for prompt in prompts],
        decoding=workspace.model.decoding,
        probe_depth=settings.probe_depth,
        n_plans=settings.plans,
        cheapest_budget=settings.cheapest_budget,
        losses=settings.losses,
        given=settings.given,
        labels=TaskLabels(workspace.labeller, tokenizer, prompts, others, full),
    )


def _parts(prompts: Sequence[Prompt], wanted: int) -> tuple[list[Prompt], list[Prompt]]:
    """The prompts that a search looks at, half of them at most, and the others."""
    looked_at = spread(prompts, max(1, min(wanted, len(prompts) // 2)))
    known = set(looked_at)
    return looked_at, [prompt for prompt in prompts if prompt not in known]
