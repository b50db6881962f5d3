"""The partition into lanes is the best of all, and never gives a prompt less than its plan."""

import itertools
import random

import numpy as np
import pytest
from tiny import N_LAYERS

from backbone.plan import LayerPlan, PlanMenu
from runtime.lanes import lane_a_plan, least_time_lanes, partition

MENU = PlanMenu.build(
    [LayerPlan.skipping(N_LAYERS, {5}), LayerPlan.skipping(N_LAYERS, {3, 4}), LayerPlan.exiting(N_LAYERS, 2)],
    [(10, 20)] * N_LAYERS,
    2,
)


def random_time(draw: random.Random):
    """A time that grows with rows and budget, with steps and kinks."""
    grid = np.cumsum([draw.choice([0.0, 0.1, 1.0, 3.0]) for _ in range(12)])
    fixed, slope = draw.uniform(0, 4), draw.uniform(0.1, 3)

    def lane_ms(budget, prompts):
        return (fixed + budget * slope * (1 + grid[prompts])) * (prompts > 0)

    return lane_ms


def brute_force(budgets, lane_ms, max_prompts=None, max_lanes=None) -> float:
    """The least time over all ways to put prompts into lanes, neighbours or not."""
    best = np.inf
    for places in itertools.product(range(len(budgets)), repeat=len(budgets)):
        lanes = [[b for b, place in zip(budgets, places, strict=True) if place == lane] for lane in {*places}]
        if len(lanes) <= (max_lanes or 99) and max(map(len, lanes)) <= (max_prompts or 99):
            best = min(best, sum(float(lane_ms(max(lane), np.array([len(lane)]))[0]) for lane in lanes))
    return best


def time_of(budgets, counts, lane_ms) -> float:
    ends = np.cumsum(counts)
    return sum(float(lane_ms(budgets[end - 1], np.array([count]))[0]) for end, count in zip(ends, counts, strict=True))


@pytest.mark.parametrize(
    "limits", [{}, {"max_lanes": 1}, {"max_lanes": 2}, {"max_prompts": 2}, {"max_lanes": 9}], ids=str
)
@pytest.mark.parametrize("seed", range(12))
def test_the_partition_is_the_best_of_all(seed, limits) -> None:
    draw = random.Random(seed)
    budgets = sorted(draw.choice([0.3, 0.5, 0.6, 1.0]) for _ in range(draw.randint(1, 6)))
    lane_ms = random_time(draw)
    counts = partition(budgets, lane_ms, **limits)
    assert sum(counts) == len(budgets)
    assert min(counts) > 0
    assert len(counts) <= limits.get("max_lanes", 99)
    assert max(counts) <= limits.get("max_prompts", 99)
    assert time_of(budgets, counts, lane_ms) == pytest.approx(brute_force(budgets, lane_ms, **limits))


def test_prompts_are_only_rounded_up_and_none_is_lost() -> None:
    draw = random.Random(0)
    for _ in range(50):
        chosen = [draw.randrange(len(MENU)) for _ in range(draw.randint(1, 9))]
        lanes = least_time_lanes(MENU, chosen, random_time(draw), max_lanes=draw.choice([None, 1, 2]))
        assert sorted(prompt for lane in lanes for prompt in lane.prompts) == list(range(len(chosen)))
        assert len({lane.plan for lane in lanes}) == len(lanes)
        for lane in lanes:
            assert all(MENU.plans.index(lane.plan) >= chosen[prompt] for prompt in lane.prompts)
            assert any(MENU.plans.index(lane.plan) == chosen[prompt] for prompt in lane.prompts)


def test_dear_passes_make_one_lane_and_dear_rows_make_many() -> None:
    chosen = [3, 0, 1, 0, 2]
    together = least_time_lanes(MENU, chosen, lambda budget, prompts: 1 + budget + 0.0 * prompts)
    assert [lane.prompts for lane in together] == [(0, 1, 2, 3, 4)]
    apart = least_time_lanes(MENU, chosen, lambda budget, prompts: budget * prompts)
    assert apart == lane_a_plan(MENU, chosen)
    assert [lane.prompts for lane in apart] == [(1, 3), (2,), (4,), (0,)]


def test_a_batch_that_is_not_full_is_filled_up() -> None:
    """Of 6 cheap prompts and 2 dear ones, in batches of 4, two cheap ones ride with the dear, the largest first."""
    chosen, sizes = [0, 0, 0, 3, 0, 0, 0, 3], [1, 9, 2, 1, 8, 3, 4, 1]
    batch = lambda budget, prompts: 1 + 10 * budget + 0.0 * prompts  # noqa: E731
    lanes = least_time_lanes(MENU, chosen, batch, max_prompts=4, sizes=sizes)
    assert [lane.prompts for lane in lanes] == [(0, 2, 5, 6), (1, 3, 4, 7)]
