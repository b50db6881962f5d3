"""Menus: the plans that all prompts of a run choose from. Each method proposes shortened plans."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from backbone.errors import PlanError
from backbone.plan import LayerPlan, PlanMenu, SublayerBytes
from backbone.registry import Registry

if TYPE_CHECKING:
    from oracle.menus.base import Advance, MenuTask

MENUS: Registry[Callable[[MenuTask, Advance], list[LayerPlan]]] = Registry(
    "menus",
    {
        "given": "oracle.menus.methods:given",
        "exits": "oracle.menus.methods:exits",
        "heads": "oracle.menus.methods:heads",
        "gaps": "oracle.menus.methods:gaps",
        "evenly": "oracle.menus.methods:evenly",
        "greedy": "oracle.menus.methods:greedy",
        "covering": "oracle.menus.covering:covering",
    },
)
"""Name -> method: `method(task, advance)` proposes shortened plans; it may call `advance` at every step of a search."""

LOOK_AT_NO_PROMPTS = frozenset({"given", "exits", "heads", "gaps", "evenly"})
"""The methods that need no prompts; any other may read the model's answers to those of its task."""

LOSSES = (0.0, 0.02, 0.05)
"""Shares of the full model's mean score that a menu's oracle may lose where nothing else is asked for."""


def build_menu(method: str, task: MenuTask, advance: Advance = lambda: None) -> PlanMenu:
    """The menu of a method's plans and the full plan; `advance` is called at every step of a search.

    Raises:
        PlanError: the task asks for plans that the model cannot have.
        InputError: no such method.
    """
    from backbone.families import sublayer_bytes  # torch, which names alone do not need

    check_depths(method, task.n_layers, task.probe_depth, task.cheapest_budget)
    return checked_menu(method, MENUS[method](task, advance), sublayer_bytes(task.model), task.probe_depth)


def checked_menu(method: str, plans: Sequence[LayerPlan], sublayer_bytes: SublayerBytes, probe_depth: int) -> PlanMenu:
    """The menu of these plans and the full plan. Raises PlanError where these are no more than the full plan."""
    menu = PlanMenu.build(plans, sublayer_bytes, probe_depth)
    if len(menu) == 1:
        what = "menu.given holds" if method == "given" else f"the menu {method!r} found"
        raise PlanError(f"{what} the full plan alone, so there is nothing to choose from; it needs a shorter plan")
    return menu


def check_depths(method: str, n_layers: int, probe_depth: int, cheapest_budget: float) -> None:
    """Raises PlanError where a method can leave out no layer of so many."""
    deepest = n_layers - 1 - (method == "evenly")  # which runs a layer behind the probe
    if not 1 <= probe_depth <= deepest:
        raise PlanError(f"menu.probe_depth must be from 1 to {deepest} for this model, got {probe_depth}")
    if method != "given" and round(cheapest_budget * n_layers) >= n_layers:
        raise PlanError(
            f"menu.cheapest_budget must be at most {(n_layers - 1) / n_layers:.2f} for this model of {n_layers} "
            f"layers, got {cheapest_budget:g}"
        )


def search_steps(method: str, task: MenuTask) -> int:
    """At most how often a search will call `advance`; 0 for methods that do not search."""
    if method == "covering":
        from oracle.menus.covering import most_measured

        return most_measured(task)
    if method != "greedy":
        return 0
    removable = task.n_layers - task.probe_depth
    removed = min(removable, math.ceil((1 - task.cheapest_budget) * task.n_layers))
    return sum(removable - done for done in range(max(removed, 1)))
