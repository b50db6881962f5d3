from itertools import product

import numpy as np
import pytest

from oracle.frontier.frontier import (
    budget_at,
    captured_headroom,
    equal_mean_budget,
    headroom,
    least_sufficient,
    oracle_hull,
    own_score_budget,
    static_points,
    sufficient_plans,
    surely_sufficient,
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


def test_captured_headroom_is_one_for_the_oracle_and_nought_for_a_mixture() -> None:
    scores = np.array([[1.0, 1.0, 1.0], [0.0, 1.0, 1.0], [0.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    hull, oracle = upper_hull(static_points(scores, BUDGETS)), oracle_hull(scores, BUDGETS)
    for quality in (0.6, 0.9, 1.0):
        assert captured_headroom(quality, budget_at(oracle, quality), scores, BUDGETS) == pytest.approx(1)
        assert captured_headroom(quality, budget_at(hull, quality), scores, BUDGETS) == pytest.approx(0)
    assert np.isnan(captured_headroom(0.5, 0.5, np.ones((4, 3)), BUDGETS))


def test_a_policy_better_than_every_mixture_is_held_against_the_best_of_them() -> None:
    scores = np.array([[1.0, 0.0, 0.0], [0.0, 0.5, 1.0], [0.0, 0.0, 1.0]])
    best = max(scores.mean(axis=0))
    at_best = captured_headroom(best, 0.8, scores, BUDGETS)
    assert captured_headroom(1.0, 0.8, scores, BUDGETS) == at_best
    assert 0 < at_best < 1


def test_a_lucky_plan_is_not_surely_sufficient() -> None:
    sufficient = np.array([[1, 0, 1], [0, 1, 1], [1, 1, 1], [0, 0, 1]], dtype=bool)
    np.testing.assert_array_equal(surely_sufficient(sufficient), [[0, 0, 1], [0, 1, 1], [1, 1, 1], [0, 0, 1]])
    assert own_score_budget(sufficient, BUDGETS) == pytest.approx((1.0 + 0.7 + 0.4 + 1.0) / 4)
    assert budgets_of_least(sufficient) == pytest.approx((0.4 + 0.7 + 0.4 + 1.0) / 4)


def budgets_of_least(sufficient: np.ndarray) -> float:
    return float(BUDGETS[least_sufficient(sufficient)].mean())


def test_at_equal_mean_prompts_that_win_pay_for_prompts_that_lose() -> None:
    """The first prompt is better off with the cheapest plan, so the second may lose as much."""
    scores = np.array([[1.0, 0.0, 0.0], [0.0, 0.5, 1.0]])
    assert equal_mean_budget(scores, BUDGETS) == pytest.approx(0.4)
    assert own_score_budget(sufficient_plans(scores), BUDGETS) == pytest.approx((0.4 + 1.0) / 2)


def test_equal_mean_is_no_cheaper_than_with_mixtures_and_dearer_by_less_than_a_prompt() -> None:
    scores = np.random.default_rng(1).random((50, 3))
    relaxed = budget_at(oracle_hull(scores, BUDGETS), scores[:, -1].mean())
    assert relaxed - 1e-9 <= equal_mean_budget(scores, BUDGETS) <= relaxed + 0.6 / 50


def test_headroom_is_what_knowing_the_prompt_saves_and_not_what_a_static_plan_saves() -> None:
    all_need = np.tile([0.0, 1.0, 1.0], (6, 1))
    assert headroom(all_need, BUDGETS) == pytest.approx(0.0)
    each_its_own = np.tile([[1.0, 1.0, 1.0], [0.0, 1.0, 1.0], [0.0, 0.0, 1.0]], (2, 1))
    assert headroom(each_its_own, BUDGETS) == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("budgets", "scores"),
    [
        (BUDGETS, np.random.default_rng(0).random((6, 3))),
        (np.array([0.4, 0.4, 0.7, 0.7, 1.0]), np.random.default_rng(2).integers(0, 4, (7, 5)) * 0.1),
    ],
    ids=["continuous", "equal budgets and rounding"],
)
def test_oracle_hull_is_the_best_of_all_allocations(budgets, scores) -> None:
    n, n_plans = scores.shape
    choices = [list(plans) for plans in product(range(n_plans), repeat=n)]
    best = np.array(upper_hull([(budgets[plans].mean(), scores[np.arange(n), plans].mean()) for plans in choices]))
    found = np.array(oracle_hull(scores, budgets))
    for hull, other in ((found, best), (best, found)):
        np.testing.assert_allclose(np.interp(hull[:, 0], *other.T), hull[:, 1], atol=1e-9)
    assert budget_at(found, scores.max(axis=1).mean()) == pytest.approx(found[-1, 0])
