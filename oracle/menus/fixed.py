"""Plans that follow from the number of layers alone, and those that the user wrote down."""

from __future__ import annotations

import random

from backbone.plan import LayerPlan
from oracle.menus.base import Advance, MenuTask
from oracle.spread import spread

GAP_LENGTHS = 8
"""Lengths of gaps that are tried, at most."""


def given(task: MenuTask, advance: Advance) -> list[LayerPlan]:
    """The plans that the user wrote down."""
    return [LayerPlan.parse(text, task.n_layers) for text in task.given]


def evenly(task: MenuTask, advance: Advance) -> list[LayerPlan]:
    """Evenly spread skips (Unified Layer Skipping, Liu et al. 2024, arXiv 2404.06954, section 3)."""
    counts = _counts_with_last(task)
    return [LayerPlan.evenly(task.n_layers, count, probe_depth=task.probe_depth) for count in counts]


def exiting(task: MenuTask, advance: Advance) -> list[LayerPlan]:
    """Early exits: prefixes of the model."""
    return [LayerPlan.exiting(task.n_layers, count) for count in task.counts]


def exits(task: MenuTask, advance: Advance) -> list[LayerPlan]:
    """Every early exit behind the probe layers; `n_plans` and `cheapest_budget` do not count."""
    return [LayerPlan.exiting(task.n_layers, count) for count in range(task.probe_depth + 1, task.n_layers)]


def middle_block(task: MenuTask, advance: Advance) -> list[LayerPlan]:
    """One gap of neighbouring layers, centred between the probe layers and the last layer."""
    plans = []
    for count in _counts_with_last(task):
        skipped = task.n_layers - count
        first = task.probe_depth + (task.n_layers - 1 - task.probe_depth - skipped) // 2
        plans.append(LayerPlan.skipping(task.n_layers, range(first, first + skipped)))
    return plans


def _counts_with_last(task: MenuTask) -> list[int]:
    """Numbers of layers for the K - 1 shortened plans where the last layer runs in all of them."""
    shortest = max(task.probe_depth + 1, task.fewest_layers)
    return spread(range(shortest, task.n_layers), task.n_plans - 1)


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


def random_routes(task: MenuTask, advance: Advance) -> list[LayerPlan]:
    """Layers drawn at random, nested, as a yardstick (Glavas et al. 2024, arXiv 2410.20022, section 4); seed 0."""
    order = list(range(task.probe_depth, task.n_layers))
    random.Random(0).shuffle(order)
    return [LayerPlan.skipping(task.n_layers, order[: task.n_layers - count]) for count in task.counts]
