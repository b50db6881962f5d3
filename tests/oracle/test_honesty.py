"""Luck and skill, each alone: where scores are all luck the unflattered oracle gains nothing, where they have none it
loses nothing."""

import numpy as np
import pytest

from oracle.frontier.frontier import budget_at, equal_mean_budget, oracle_hull
from oracle.frontier.split_half import corrected_path, corrected_sweep, from_other_plans, split_half

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
    """One prompt, two plans: the first scoring goes up to the full plan, the second stays where it is."""
    scores_a, scores_b = np.array([[0.0, 1.0]]), np.array([[0.5, 0.1]])
    points = split_half(scores_a, scores_b, np.array([0.5, 1.0]))
    assert points == [(0.5, pytest.approx((0.5 + 0.0) / 2)), (1.0, pytest.approx((0.1 + 0.0) / 2))]


def at_a_loss_of_5_percent(curve: object, scores: np.ndarray) -> float:
    return budget_at(curve, 0.95 * float(scores[:, -1].mean()))


@pytest.mark.parametrize("luck", [0.1, 0.3, 1.0])
def test_one_scoring_is_corrected_nearly_as_by_two(luck: float) -> None:
    """Of prompts whose need grows in steps, a share `luck` of the scores is drawn by chance."""
    random, need = np.random.default_rng(3), np.random.default_rng(4).random((700, 1))
    skill = need <= np.linspace(0.4, 1, 7)
    one, other = (np.where(random.random(skill.shape) < luck, lucky(seed, 700), skill) for seed in (5, 6))
    corrected = corrected_path(corrected_sweep(one, BUDGETS), one, BUDGETS)
    two = at_a_loss_of_5_percent([*split_half(one, other, BUDGETS), (1.0, one[:, -1].mean())], one)
    assert at_a_loss_of_5_percent(corrected, one) == pytest.approx(two, abs=0.06)
    assert at_a_loss_of_5_percent(oracle_hull(one, BUDGETS), one) < two - 0.2, "the flattered one"


def test_a_score_has_no_part_in_what_foretells_it() -> None:
    scores = lucky(4, 60)
    changed = scores.copy()
    changed[7, 2] = 1 - changed[7, 2]
    assert from_other_plans(changed)[7, 2] == pytest.approx(from_other_plans(scores)[7, 2])
