"""Plans that follow from the number of layers alone, and those that the user wrote down."""

from __future__ import annotations

from backbone.plan import LayerPlan
from oracle.batches import spread
from oracle.menus.base import Advance, MenuTask

GAP_LENGTHS = 8
"""Lengths of gaps that are tried, at most."""


def given(task: MenuTask, advance: Advance) -> list[LayerPlan]:
    """The plans that the user wrote down."""
    return [LayerPlan.parse(text, task.n_layers) for text in task.given]


def exits(task: MenuTask, advance: Advance) -> list[LayerPlan]:
    """Early exits, evenly spread from the cheapest budget to the last layer."""
    return [LayerPlan.exiting(task.n_layers, count) for count in task.counts]


def evenly(task: MenuTask, advance: Advance) -> list[LayerPlan]:
    """Evenly spread skips, the last layer kept (Unified Layer Skipping, Liu et al. 2024, arXiv 2404.06954, sec. 3)."""
    counts = spread(range(max(task.probe_depth + 1, task.fewest_layers), task.n_layers), task.n_plans - 1)
    return [LayerPlan.evenly(task.n_layers, count, probe_depth=task.probe_depth) for count in counts]


def gaps(task: MenuTask, advance: Advance) -> list[LayerPlan]:
    """One gap of neighbouring layers, of lengths and at places evenly spread from the probe layers to the last."""
    longest = task.n_layers - task.fewest_layers
    lengths = spread(range(1, longest + 1), max(1, min(GAP_LENGTHS, task.n_plans - 1)))
    places = max(1, (task.n_plans - 1) // len(lengths))
    return [
        LayerPlan.skipping(task.n_layers, range(first, first + length))
        for length in lengths
        for first in spread(range(task.probe_depth, task.n_layers - length + 1), places)
    ]
