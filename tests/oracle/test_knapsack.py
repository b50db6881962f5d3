"""Every optimum is held against all choices there are, summed up by dynamic programming."""

import numpy as np
import pytest

from backbone.errors import InputError
from oracle.frontier import knapsack
from oracle.frontier.knapsack import ROUNDING, TOLERANCE, KnapsackError, cheapest_choices
from oracle.frontier.sweep import path, sweep

BUDGETS = np.array([0.3, 0.45, 0.45, 0.8, 1.0])
KINDS = ("continuous", "binary", "levels", "constant", "full is worst")


def drawn(kind: str, seed: int, n: int) -> np.ndarray:
    """Scores [n, 5]."""
    draws = np.random.default_rng(seed)
    return {
        "continuous": draws.random((n, 5)),
        "binary": draws.integers(0, 2, (n, 5)).astype(float),
        "levels": draws.integers(0, 4, (n, 5)) / 3,
        "constant": np.full((n, 5), 0.5),
        "full is worst": np.column_stack([draws.random((n, 4)), np.zeros(n)]),
    }[kind]


def measured(chosen: np.ndarray, scores: np.ndarray, budgets: np.ndarray = BUDGETS) -> tuple[float, float]:
    return float(budgets[chosen].mean()), float(scores[np.arange(len(scores)), chosen].mean())


def most_by_units(scores: np.ndarray, units: np.ndarray) -> np.ndarray:
    """The most sum of scores at each sum of units, by dynamic programming over the prompts."""
    most = np.zeros(units[-1] * len(scores) + 1)
    for row in scores:
        runs = zip(units, row, strict=True)
        most = np.max([np.append(np.full(u, -np.inf), most[: len(most) - u]) + score for u, score in runs], axis=0)
    return np.maximum.accumulate(most)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(10))
def test_no_choice_with_the_mean_score_is_cheaper(kind, seed) -> None:
    """Budgets in units of a 40th, so that dynamic programming knows the optimum of any number of prompts."""
    draws = np.random.default_rng(seed)
    n, units = 5 if seed < 4 else int(draws.integers(20, 120)), np.sort(draws.choice(np.arange(3, 41), 5))
    scores, budgets = drawn(kind, seed, n), units / 40
    most = most_by_units(scores, units)
    best = scores.max(axis=1).mean()
    for wanted in (0.0, scores[:, -1].mean(), scores.mean(axis=0).max(), *(best * np.array([0.5, 0.7, 0.9, 0.99, 1]))):
        budget, quality = measured(cheapest_choices(scores, budgets, wanted), scores, budgets)
        assert quality >= wanted - 2 * ROUNDING
        assert budget == pytest.approx(np.flatnonzero(most >= (wanted - ROUNDING) * n)[0] / 40 / n, abs=TOLERANCE)


@pytest.mark.parametrize("kind", ["continuous", "binary", "levels"])
def test_a_core_of_one_plan_finds_as_good_a_choice(kind, monkeypatch) -> None:
    """What the pruning leaves out can never matter, however little it leaves in."""
    scores = drawn(kind, 7, n=60)
    wanted = [share * scores.max(axis=1).mean() for share in (0.6, 0.8, 0.95)]

    def optima() -> list[float]:
        return [measured(cheapest_choices(scores, BUDGETS, share), scores)[0] for share in wanted]

    with_default = optima()
    for core in (1, 10_000):
        monkeypatch.setattr(knapsack, "CORE", core)
        np.testing.assert_allclose(optima(), with_default, rtol=0, atol=2 * TOLERANCE)


def test_many_prompts_are_solved_to_the_relaxations_bound() -> None:
    """With 2,000 prompts of continuous scores no mean budget lies between the bound and the optimum."""
    budgets = np.linspace(0.3, 1.0, 15)
    scores = np.random.default_rng(0).random((2000, 15)) * budgets
    relaxed = path(sweep(scores, budgets), scores, budgets)
    wanted = float(np.interp(0.5, *relaxed.T))
    cheapest, reached = measured(cheapest_choices(scores, budgets, wanted), scores, budgets)
    assert reached >= wanted - ROUNDING
    assert 0.5 - ROUNDING <= cheapest <= 0.5 + 0.05 / 2000 + ROUNDING, "budgets differ by 0.05"


@pytest.mark.parametrize("value", [0.51, float("nan")])
def test_a_mean_score_above_the_best_plans_is_refused(value) -> None:
    with pytest.raises(KnapsackError, match=f"mean score of {value:.6g} or more; ask for 0.5 or less"):
        cheapest_choices(drawn("constant", 0, 5), BUDGETS, value)
    assert issubclass(KnapsackError, InputError)
