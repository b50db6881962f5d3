import numpy as np
import pytest

from oracle.frontier.bootstrap import bootstrap_band, bootstrap_interval


def test_the_interval_of_a_mean_is_the_normal_one() -> None:
    sample = np.random.default_rng(0).normal(3.0, 2.0, 400)
    low, high = bootstrap_interval(lambda drawn: float(sample[drawn].mean()), 400, repeats=4000)
    half = 1.645 * sample.std() / 20
    assert low == pytest.approx(sample.mean() - half, abs=0.05 * half)
    assert high == pytest.approx(sample.mean() + half, abs=0.05 * half)


def test_nine_in_ten_intervals_cover_the_true_mean() -> None:
    draws, covered = np.random.default_rng(1), 0
    for _ in range(300):
        sample = draws.normal(0.0, 1.0, 80)
        low, high = bootstrap_interval(lambda drawn, of=sample: float(of[drawn].mean()), 80, repeats=200)
        covered += low <= 0.0 <= high
    assert 0.83 <= covered / 300 <= 0.95


def test_draws_that_are_not_defined_are_left_out() -> None:
    def first_if_even(drawn: np.ndarray) -> float:
        return 5.0 if drawn[0] % 2 == 0 else float("nan")

    assert bootstrap_interval(first_if_even, 10) == (5.0, 5.0)
    assert np.isnan(bootstrap_interval(lambda drawn: float("nan"), 10)).all()


def test_the_seed_decides() -> None:
    def first(drawn: np.ndarray) -> float:
        return float(drawn[:3].sum())

    assert bootstrap_interval(first, 1000) == bootstrap_interval(first, 1000)
    assert bootstrap_interval(first, 1000, seed=1) != bootstrap_interval(first, 1000)


def test_a_band_holds_the_interval_of_each_statistic() -> None:
    samples = np.random.default_rng(0).normal(0.0, 1.0, (3, 50))
    low, high = bootstrap_band(lambda drawn: samples[:, drawn].mean(axis=1), 50)
    for place, sample in enumerate(samples):
        own = bootstrap_interval(lambda drawn, of=sample: float(of[drawn].mean()), 50)
        assert (low[place], high[place]) == pytest.approx(own)
