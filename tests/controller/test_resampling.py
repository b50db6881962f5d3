import numpy as np
import pytest
from redrawn_splits import Draw, redrawn, resampled_violations

from controller.base import ChoiceRule
from controller.certificate.calibration import last_valid, price_p_values
from controller.certificate.risks import CalibrationError

BUDGETS = np.array([0.6, 0.8, 1.0])
LOST = ChoiceRule(BUDGETS, "score_lost")


def pool(n: int, noise: float, risk: str = "score_lost", seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Expected and true losses [n, 3] of prompts whose need is known up to noise."""
    random = np.random.default_rng(seed)
    need = random.random((n, 1))
    lack = need - np.array([[0.5, 0.8, 1.0]])
    seen = lack + noise * random.normal(size=(n, 1))
    counted = risk == "insufficient"
    expected = 1 / (1 + np.exp(-seen / noise)) if counted else np.clip(seen, 0, 1)
    expected[:, -1] = 0
    return expected.astype(np.float32), (lack > 0).astype(float) if counted else np.clip(lack, 0, 1)


@pytest.mark.parametrize("risk", ["insufficient", "score_lost"])
def test_certificates_on_splits_hold_and_save_something(risk) -> None:
    expected, losses = pool(500, 0.1, risk)
    found = resampled_violations(expected, losses, ChoiceRule(BUDGETS, risk), 0.06, 0.1, 250, 100)
    assert found.certified > 0.9
    assert found.of_pool.low <= 0.1
    assert found.of_pool.low <= found.of_pool.value <= found.of_pool.high
    assert found.mean_budget < 0.97
    assert 0 < found.mean_risk <= 0.06


def test_certificates_of_the_mean_score_hold_and_save_something() -> None:
    """The cheap plan is as good as the full one on average, and known to be better for half of the prompts."""
    random = np.random.default_rng(0)
    full, better = np.full(500, 0.5), random.random(500) < 0.5
    losses = np.column_stack([np.where(better, -0.3, 0.3) + random.uniform(-0.2, 0.2, 500), np.zeros((500, 2))])
    expected = np.column_stack([np.where(better, -0.2, 0.2), np.zeros((500, 2))]).astype(np.float32)
    found = resampled_violations(expected, losses, ChoiceRule(BUDGETS, "mean_score"), 0.05, 0.1, 250, 100, full=full)
    assert found.certified == 1
    assert found.of_pool.low <= 0.1
    assert found.mean_budget < 0.85, "it pays for more than the prompts it is better for"
    assert found.mean_risk < 0, "more is won than lost"


def test_losses_that_no_price_avoids_leave_the_full_plan() -> None:
    expected = np.zeros((300, 3), dtype=np.float32)  # a controller that sees no danger
    losses = np.tile([0.5, 0.5, 0.0], (300, 1))
    found = resampled_violations(expected, losses, LOST, 0.06, 0.1, 150, 20)
    assert (found.certified, found.of_pool.value, found.mean_budget, found.mean_risk) == (0, 0, 1, 0)


def test_splits_that_shorten_nothing_are_not_certified() -> None:
    expected = np.tile(np.array([[np.nan, np.nan, 0.0]], dtype=np.float32), (300, 1))  # as of outliers
    found = resampled_violations(expected, np.zeros((300, 3)), LOST, 0.06, 0.1, 150, 20)
    assert (found.certified, found.mean_budget) == (0, 1)


def test_a_test_sample_is_a_harder_judge_than_the_pool() -> None:
    expected, losses = pool(300, 0.1, "insufficient")
    found = resampled_violations(expected, losses, ChoiceRule(BUDGETS, "insufficient"), 0.1, 0.1, 150, 200)
    assert found.of_test.value > found.of_pool.value


def test_the_rate_shown_is_that_of_fresh_prompts() -> None:
    """One plan whose mean loss lies a hair above the bound: the pool's own draws and fresh ones fail equally often."""
    n, alpha, random = 400, 0.0999, np.random.default_rng(0)
    losses = np.zeros((2, n))
    losses[0, : n // 10] = 1.0
    run = np.array([[0.5], [1.0]]).repeat(n, axis=1)
    shown = redrawn(losses, run, alpha, 0.1, n // 2, 1000).of_pool.value
    fresh = (random.random((1000, 1, n // 2)) < 0.1).astype(float)
    truth = np.mean([last_valid(price_p_values(some, alpha, 0.1, "insufficient"), 0.1) is not None for some in fresh])
    assert truth > 0.02
    assert shown == pytest.approx(truth, rel=0.3), "drawn without replacement it is a third of the truth"


def test_the_same_seed_draws_the_same_splits() -> None:
    expected, losses = pool(300, 0.1)
    runs = [resampled_violations(expected, losses, LOST, 0.05, 0.1, 150, 20, s) for s in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize("n_calibrate", [0, 300, 301])
def test_a_split_has_two_sides(n_calibrate) -> None:
    expected, losses = pool(300, 0.1)
    with pytest.raises(CalibrationError, match="both sides"):
        resampled_violations(expected, losses, LOST, 0.05, 0.1, n_calibrate)


def test_a_draw_learns_from_some_and_draws_from_all_others() -> None:
    draw, again = Draw.of(100, {"train": 20, "tune": 10, "calibrate": 50, "test": 30}, 0, times=2)
    assert (len(draw.fit), draw.held.sum(), len(draw.population), len(draw.test)) == (30, 10, 70, 30)
    assert sorted([*draw.fit, *draw.population]) == list(range(100))
    assert {*draw.calibrate, *draw.test} <= {*draw.population}
    assert len(set(draw.calibrate)) < len(draw.calibrate) == 50, "drawn with replacement"
    assert list(again.fit) == list(draw.fit)
    assert list(again.calibrate) != list(draw.calibrate)
