"""Luck and skill, each alone: where scores are all luck the unflattered oracle gains nothing, where they have none it
loses nothing."""

import numpy as np
import pytest
from split_half import split_half

from oracle.frontier.frontier import equal_mean_budget, oracle_hull

BUDGETS = np.linspace(0.4, 1.0, 7)
CHANCES = 0.2 + 0.6 * (BUDGETS - 0.4) / 0.6
"""Of a right answer, the same for all prompts and in proportion to the budget: no choice of plans beats a mixture."""


def lucky(seed: int, n: int = 5000) -> np.ndarray:
    return (np.random.default_rng(seed).random((n, len(BUDGETS))) < CHANCES).astype(float)


def test_where_all_is_luck_the_naive_oracle_shines_and_the_unflattered_one_is_a_static_mixture() -> None:
    scores_a, scores_b = lucky(0), lucky(1)
    assert equal_mean_budget(scores_a, BUDGETS) < 0.55
    for budget, quality in split_half(scores_a, scores_b, BUDGETS):
        assert quality == pytest.approx(np.interp(budget, BUDGETS, CHANCES), abs=0.02)


def test_where_nothing_is_luck_nothing_is_taken_away() -> None:
    scores = np.sort(np.random.default_rng(2).random((300, len(BUDGETS))), axis=1)
    honest, naive = np.array(split_half(scores, scores, BUDGETS)), np.array(oracle_hull(scores, BUDGETS))
    np.testing.assert_allclose(np.interp(honest[:, 0], *naive.T), honest[:, 1], atol=1e-9)


def test_the_two_ways_are_averaged_at_equal_budget() -> None:
    """One prompt, two plans: the first scoring climbs to the full plan, the second stays where it is."""
    scores_a, scores_b = np.array([[0.0, 1.0]]), np.array([[0.5, 0.1]])
    points = split_half(scores_a, scores_b, np.array([0.5, 1.0]))
    assert points == [(0.5, pytest.approx((0.5 + 0.0) / 2)), (1.0, pytest.approx((0.1 + 0.0) / 2))]
