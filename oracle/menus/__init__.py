"""Menus: the plans that all prompts of a run choose from. Each method proposes shortened plans."""

from __future__ import annotations

from collections.abc import Callable

from backbone.families import sublayer_bytes
from backbone.plan import LayerPlan, PlanMenu
from oracle.menus.base import Advance, MenuTask
from oracle.menus.block_influence import block_influence
from oracle.menus.bridged_greedy import bridged_layers
from oracle.menus.fixed import evenly, exiting, given, middle_block, random_routes
from oracle.menus.greedy import beam_layers, greedy_layers, greedy_sublayers, search_steps

__all__ = ["LOOK_AT_PROMPTS", "MENUS", "MenuTask", "build_menu", "search_steps"]

MENUS: dict[str, Callable[[MenuTask, Advance], list[LayerPlan]]] = {
    "given": given,
    "evenly": evenly,
    "exiting": exiting,
    "middle_block": middle_block,
    "random_routes": random_routes,
    "block_influence": block_influence,
    "greedy_layers": greedy_layers,
    "greedy_sublayers": greedy_sublayers,
    "beam_layers": beam_layers,
    "bridged_layers": bridged_layers,
}

LOOK_AT_PROMPTS = frozenset({"block_influence", "greedy_layers", "greedy_sublayers", "beam_layers", "bridged_layers"})
"""The methods that read the model's answers to some prompts."""


def build_menu(method: str, task: MenuTask, advance: Advance = lambda: None) -> PlanMenu:
    """The menu of a method's plans and the full plan; `advance` is called at every step of a search.

    Raises:
        PlanError: the task asks for plans that the model cannot have.
    """
    return PlanMenu.build(MENUS[method](task, advance), sublayer_bytes(task.model), task.probe_depth)
