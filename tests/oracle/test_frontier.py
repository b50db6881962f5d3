from itertools import product

import numpy as np
import pytest

from oracle.frontier import (
    budget_at,
    captured_headroom,
    least_sufficient,
    oracle_hull,
    static_points,
    sufficient_plans,
    upper_hull,
)

BUDGETS = np.array([0.4, 0.7, 1.0])


def test_sufficiency_and_the_least_plan() -> None:
    scores = np.array([[0.0, 1.0, 1.0], [0.5, 0.2, 0.5], [0.0, 0.0, 0.1]])
    sufficient = sufficient_plans(scores)
    np.testing.assert_array_equal(sufficient, [[0, 1, 1], [1, 0, 1], [0, 0, 1]])
    np.testing.assert_array_equal(least_sufficient(sufficient), [1, 0, 2])
    np.testing.assert_array_equal(least_sufficient(sufficient_plans(scores, tolerance=0.2)), [1, 0, 0])


def test_hull_drops_what_mixtures_beat() -> None:
    points = [(0.4, 0.2), (0.6, 0.25), (0.7, 0.8), (1.0, 0.7), (0.9, 0.9)]
    assert upper_hull(points) == [(0.4, 0.2), (0.7, 0.8), (0.9, 0.9)]
    assert upper_hull([(0.5, 0.1), (0.5, 0.3), (1.0, 0.3)]) == [(0.5, 0.3)]


def test_budget_at_a_quality_lies_between_the_neighbours() -> None:
    hull = [(0.4, 0.2), (0.8, 0.6), (1.0, 0.7)]
    assert budget_at(hull, 0.1) == 0.4
    assert budget_at(hull, 0.4) == pytest.approx(0.6)
    assert budget_at(hull, 0.7) == 1.0
    assert np.isnan(budget_at(hull, 0.71))


def test_oracle_hull_is_the_best_of_all_allocations() -> None:
    scores = np.random.default_rng(0).random((6, 3))
    everything = [
        (BUDGETS[list(plans)].mean(), scores[np.arange(6), list(plans)].mean()) for plans in product(range(3), repeat=6)
    ]
    np.testing.assert_allclose(oracle_hull(scores, BUDGETS), upper_hull(everything))


def test_captured_headroom_is_one_for_the_oracle_and_nought_for_a_mixture() -> None:
    scores = np.array([[1.0, 1.0, 1.0], [0.0, 1.0, 1.0], [0.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    hull, oracle = upper_hull(static_points(scores, BUDGETS)), oracle_hull(scores, BUDGETS)
    for quality in (0.6, 0.9, 1.0):
        assert captured_headroom(quality, budget_at(oracle, quality), scores, BUDGETS) == pytest.approx(1)
        assert captured_headroom(quality, budget_at(hull, quality), scores, BUDGETS) == pytest.approx(0)
    assert np.isnan(captured_headroom(0.5, 0.5, np.ones((4, 3)), BUDGETS))
