"""Which prompts of a batch decode together: lanes, each under the largest plan of its prompts, in the least total time.

Every lane pays for a pass of its own at every step, so that few prompts a lane are dear: often a prompt is done sooner
under a larger plan than its own, in the company of others. Plans are only ever rounded up in the menu. That keeps a
certificate, as far as a larger plan of the menu is at least as good as a smaller one: so it is on the mean over prompts
for which menus are searched, while a single prompt may fare worse under the larger plan, even under the full one.

The prompts sorted by their plans, the lanes of an optimum can be taken to be neighbours: give the smallest plans to the
lane with the smallest largest plan, and no lane's plan grows. So a dynamic programme over the cuts is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from backbone.plan import LayerPlan, PlanMenu

LaneTime = Callable[[float, NDArray[np.intp]], NDArray[np.float64]]
"""Milliseconds that lanes of [N] prompts take under a plan of the given budget [N]."""


@dataclass(frozen=True, slots=True)
class Lane:
    """Prompts, by their place in the batch, that run one plan together."""

    plan: LayerPlan
    prompts: tuple[int, ...]


def lane_a_plan(menu: PlanMenu, chosen: Sequence[int]) -> list[Lane]:
    """Every prompt under its own plan [B] of the menu."""
    return [
        Lane(menu.plans[index], tuple(i for i, own in enumerate(chosen) if own == index)) for index in sorted({*chosen})
    ]


def plans_of(lanes: Sequence[Lane]) -> list[LayerPlan]:
    """The plan that each prompt runs [B]."""
    by_prompt = {prompt: lane.plan for lane in lanes for prompt in lane.prompts}
    return [by_prompt[prompt] for prompt in range(len(by_prompt))]


def least_time_lanes(
    menu: PlanMenu,
    chosen: Sequence[int],
    lane_ms: LaneTime,
    *,
    max_prompts: int | None = None,
    max_lanes: int | None = None,
    sizes: Sequence[float] | None = None,
) -> list[Lane]:
    """Lanes of least total time in which every prompt runs its own plan or a larger one, cheapest plan first.

    Args:
        chosen: for each prompt its plan in the menu [B].
        max_prompts: prompts that can run together; a lane of more runs in several batches.
        max_lanes: at most so many lanes; not together with `max_prompts`.
        sizes: of prompts of one plan those of the largest size are the first to be rounded up [B]; default: the last.
    """
    sizes = range(len(chosen)) if sizes is None else sizes
    order = sorted(range(len(chosen)), key=lambda prompt: (chosen[prompt], sizes[prompt]))
    budgets = [menu.budgets[chosen[prompt]] for prompt in order]
    rounded = list(chosen)
    start = 0
    for count in partition(budgets, lane_ms, max_prompts=max_prompts, max_lanes=max_lanes):
        members = order[start : start + count]
        start += count
        for prompt in members:
            rounded[prompt] = chosen[members[-1]]
    return lane_a_plan(menu, rounded)


def partition(
    budgets: Sequence[float], lane_ms: LaneTime, *, max_prompts: int | None = None, max_lanes: int | None = None
) -> list[int]:
    """Cut ascending budgets [B] into neighbouring lanes, each as dear as its last, of the least total time.

    Takes B * min(B, max_prompts) steps, times `max_lanes` where that is given. Of equal times the one with the larger
    last lanes wins.

    Returns:
        How many prompts each lane has.
    """
    n = len(budgets)
    largest = min(n, max_prompts or n)
    table = {budget: lane_ms(budget, np.arange(largest + 1)) for budget in {*budgets}}
    best = np.full(n + 1, np.inf)
    best[0] = 0.0
    rounds = []
    for _ in range(max_lanes or 1):
        reached = best.copy() if max_lanes else best  # without a limit, any lane may follow in the same round
        cuts = np.full(n + 1, -1)
        for stop in range(1, n + 1):
            low = max(0, stop - largest)
            totals = reached[low:stop] + table[budgets[stop - 1]][stop - low : 0 : -1]
            if totals.min() < best[stop]:
                best[stop], cuts[stop] = totals.min(), low + totals.argmin()
        rounds.append(cuts)
    return _counts(rounds, n, limited=max_lanes is not None)


def _counts(rounds: list[NDArray[np.intp]], n: int, limited: bool) -> list[int]:
    """Follow the cuts back from the last prompt; -1 says that an earlier round had reached this place as cheaply."""
    counts: list[int] = []
    stop = n
    while stop:
        start = int(rounds[-1][stop])
        if start >= 0:
            counts.append(stop - start)
            stop = start
        if limited:
            rounds = rounds[:-1]
    return counts[::-1]
