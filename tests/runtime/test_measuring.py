import numpy as np
import pytest
from scipy.stats import binom

from pipelines.evaluation.speed import FEWEST_ROUNDS, Ratio, paired_ratio, paired_seconds
from runtime.paired_timing import machine, median_seconds


def test_pieces_are_measured_in_turn_after_a_warm_up() -> None:
    calls, steps = [], []
    work = {name: (lambda name=name: calls.append(name)) for name in ("a", "b")}
    seconds = median_seconds(work, 3, lambda: steps.append(1))
    assert calls == ["a", "b"] * 4
    assert len(steps) == 8
    assert set(seconds) == {"a", "b"}
    assert all(value >= 0 for value in seconds.values())


def test_the_machine_is_described() -> None:
    assert machine().keys() == {"device", "cores", "threads", "python", "torch", "transformers"}


def test_the_interval_of_a_ratio_holds_the_true_median_as_often_as_it_says() -> None:
    """Paired noise, heavy-tailed and not symmetric: nothing is assumed of it."""
    random, true, inside = np.random.default_rng(0), 1.25, 0
    for _ in range(2000):
        noise = np.exp(random.standard_t(2, (2, 9)) * 0.2)
        found = paired_ratio((true * noise[0]).tolist(), noise[1].tolist())
        inside += found.low <= true <= found.high
    assert inside >= binom.ppf(0.001, 2000, 0.9)


@pytest.mark.parametrize(("rounds", "cut"), [(1, 0), (4, 0), (5, 1), (7, 1), (8, 2), (20, 6)])
def test_the_ends_of_an_interval_are_order_statistics(rounds, cut) -> None:
    ratios = [1 + i / 100 for i in range(rounds)]
    found = paired_ratio(ratios, [1.0] * rounds)
    outside = 2 * binom.cdf(cut - 1, rounds, 0.5)
    assert outside <= 0.1 < 2 * binom.cdf(cut, rounds, 0.5)
    expected = (ratios[cut - 1], ratios[rounds - cut]) if cut else (None, None)
    assert (found.low, found.high, found.rounds) == (*expected, rounds)


@pytest.mark.parametrize(
    ("low", "high", "exceeds"),
    [(0.6, 1.3, False), (1.05, 1.6, True), (0.5, 0.9, True), (0.99, 1.02, True), (None, None, False)],
)
def test_a_figure_that_noise_exceeds_is_not_printed(low, high, exceeds) -> None:
    value = 1.1 if low is None else (low + high) / 2
    assert Ratio(value, low, high, 9).exceeds_noise is exceeds


def test_rounds_end_when_figures_are_exact_or_time_is_up(monkeypatch) -> None:
    clock = iter(range(10**6))
    monkeypatch.setattr("pipelines.evaluation.speed.time.perf_counter", lambda: float(next(clock)))
    work = {name: (lambda: None) for name in ("a", "b")}
    steady = paired_seconds(work, [("a", "b")], rounds=50, seconds=1e9)
    assert [len(times) for times in steady.values()] == [FEWEST_ROUNDS] * 2
    noisy = iter(range(1, 10**6))
    shaky = {"a": lambda: None, "b": lambda: [next(clock) for _ in range(next(noisy) % 7)]}
    assert len(paired_seconds(shaky, [("a", "b")], rounds=12, seconds=1e9)["b"]) == 12
    assert len(paired_seconds(shaky, [("a", "b")], rounds=12, seconds=0.0)["b"]) == FEWEST_ROUNDS
