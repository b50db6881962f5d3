import threading

import numpy as np
import pytest
from scipy.stats import binom, kstest

from controller.certificate.drift import FEWEST, RECOVERY, DriftAlarm, DriftState, drift_scores
from controller.certificate.risks import CalibrationError

PLANS, SHARES = [0.7, 0.85, 1.0], [0.3, 0.4, 0.3]


def prompts(random, n, scale=1.0, shares=SHARES) -> tuple[np.ndarray, np.ndarray]:
    """Projected features [n, 16] with heavy tails, and the budgets chosen."""
    return scale * random.standard_t(6, (n, 16)).astype(np.float32), random.choice(PLANS, n, p=shares)


def alarm(random, rate=0.01, n=300) -> DriftAlarm:
    return DriftAlarm(drift_scores(*prompts(random, n)), rate, seed=int(random.integers(1 << 31)))


def test_false_alarms_are_as_rare_as_promised() -> None:
    random, runs, rate = np.random.default_rng(0), 100, 0.1
    triggered = [alarm(random, rate, 100).observe(*prompts(random, 400)) for _ in range(runs)]
    assert 0 < sum(triggered) <= binom.ppf(0.999, runs, rate)


def test_p_values_are_independent_and_uniform_also_with_ties() -> None:
    random, found = np.random.default_rng(0), []
    watched = alarm(random, n=50)
    watched._martingale.update = found.append  # type: ignore[method-assign]
    watched.observe(*prompts(random, 3000))
    for channel in np.array(found).T:
        assert kstest(channel, "uniform").pvalue > 0.01
        assert abs(np.corrcoef(channel[1:], channel[:-1])[0, 1]) < 4 / np.sqrt(3000)


@pytest.mark.parametrize(
    ("change", "within"),
    [({"scale": 1.3}, 200), ({"scale": 0.85}, 200), ({"shares": [0.05, 0.15, 0.8]}, 300)],
    ids=["further out", "a mild shrink", "larger plans"],
)
def test_another_population_triggers_the_alarm(change, within) -> None:
    for seed in range(5):
        random = np.random.default_rng(seed)
        watched = alarm(random)
        assert watched.observe(*prompts(random, within, **change))
        assert watched.triggered
        assert watched.state.alarms >= 1


@pytest.mark.parametrize("seed", [1, 3])
def test_alarm_notices_a_change_after_a_quiet_stretch(seed) -> None:
    random = np.random.default_rng(seed)
    watched = alarm(random)
    assert not watched.observe(*prompts(random, 5000))
    assert watched.observe(*prompts(random, 100, scale=1.4)), "a stake put down at once takes 110 to 125 prompts"


def test_memory_does_not_grow() -> None:
    random = np.random.default_rng(3)
    watched = alarm(random)
    before = watched._counts.nbytes
    watched.observe(*prompts(random, 2000))
    assert watched._counts.nbytes == before
    assert watched.state.seen == 2000


def test_alarm_is_active_until_reset() -> None:
    random = np.random.default_rng(0)
    watched = alarm(random)
    watched.observe(*prompts(random, 300, scale=2))
    assert watched.observe(*prompts(random, 10)), "once triggered, also for ordinary prompts"
    watched.reset()
    assert watched.state == DriftState(1.0, 0, False, 0)
    assert not watched.observe(*prompts(random, 50))


def test_alarm_clears_once_prompts_are_as_before() -> None:
    for seed in range(5):
        random = np.random.default_rng(seed)
        watched = alarm(random)
        assert watched.observe(*prompts(random, FEWEST, scale=2))
        for _ in range(20):
            assert watched.observe(*prompts(random, 100, scale=2)), "the new prompts have not become the usual ones"
        assert watched.state.alarms > 5
        assert not watched.observe(*prompts(random, FEWEST + RECOVERY))
        assert watched.observe(*prompts(random, 150, scale=2)), "it is triggered again"


def test_two_false_triggers_are_as_rare_as_the_rate_squared() -> None:
    """Two false alarms are as rare as the square of the rate."""
    random, runs, rate = np.random.default_rng(1), 80, 0.2
    alarms = np.array([_alarms_after(alarm(random, rate, 100), prompts(random, 1000)) for _ in range(runs)])
    assert 0 < (alarms >= 1).sum() <= binom.ppf(0.999, runs, rate)
    assert (alarms >= 2).sum() <= binom.ppf(0.999, runs, rate**2)


def _alarms_after(watched: DriftAlarm, served: tuple[np.ndarray, np.ndarray]) -> int:
    watched.observe(*served)
    return watched.state.alarms


def test_the_same_prompts_over_and_over_are_counted_once() -> None:
    random = np.random.default_rng(0)
    watched, kept = alarm(random), prompts(random, 8, scale=2)
    keys = [bytes([row]) for row in range(8)]
    for _ in range(100):
        assert not watched.observe(*kept, keys)
    assert watched.state.seen == 8
    unnamed = alarm(random)
    assert any(unnamed.observe(*kept) for _ in range(100)), "without names they are drift"


def test_few_prompts_of_one_kind_do_not_trigger_the_alarm() -> None:
    random = np.random.default_rng(0)
    watched = alarm(random)
    assert not watched.observe(*prompts(random, FEWEST - 1, scale=3))
    assert watched.observe(*prompts(random, 1, scale=3))


def test_states_that_are_not_finite_are_the_oddest() -> None:
    random = np.random.default_rng(0)
    watched = alarm(random)
    features, budgets = prompts(random, FEWEST)
    features[:, 3] = np.nan
    assert watched.observe(features, budgets)


def test_constant_scores_do_not_trigger_the_alarm() -> None:
    watched = DriftAlarm(np.ones((100, 2)), 0.01)
    assert not watched.observe_scores(np.ones((1000, 2)))
    assert watched.observe_scores(np.full((100, 2), 2.0))


def test_rows_of_one_call_may_be_sorted() -> None:
    random, triggered = np.random.default_rng(0), 0
    for _ in range(20):
        features, budgets = prompts(random, 400)
        order = np.square(features).mean(1).argsort()
        triggered += alarm(random).observe(features[order], budgets[order])
    assert triggered <= binom.ppf(0.999, 20, 0.01)


def test_threads_lose_no_prompt() -> None:
    random = np.random.default_rng(3)
    watched = alarm(random, rate=1e-9)  # the order is not ours, so no seed rules out a false alarm
    batches = [drift_scores(*prompts(random, 10)) for _ in range(40)]
    workers = [
        threading.Thread(target=lambda part: [watched.observe_scores(b) for b in part], args=(batches[i::4],))
        for i in range(4)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert watched.state.seen == 400
    assert watched._counts.sum() == 2 * (300 + 400)


def test_a_saved_alarm_is_triggered_at_the_same_prompt(tmp_path) -> None:
    random = np.random.default_rng(0)
    first = DriftAlarm(drift_scores(*prompts(random, 300)), 0.02)
    first.save(tmp_path / "drift.safetensors")
    second = DriftAlarm.load(tmp_path / "drift.safetensors")
    assert second.false_alarm_rate == 0.02
    served = prompts(random, 200, scale=1.3)
    assert first.observe(*served) == second.observe(*served)
    assert first.state == second.state


def test_bad_input_is_one_sentence(tmp_path) -> None:
    with pytest.raises(CalibrationError, match=r"shape \(0, 2\)"):
        DriftAlarm(np.zeros((0, 2)))
    with pytest.raises(CalibrationError, match="non-negative"):
        DriftAlarm(np.array([[np.nan, 1.0]]))
    with pytest.raises(CalibrationError, match="rate must lie between 0 and 1, both excluded; got 0"):
        DriftAlarm(np.ones((3, 2)), 0)
    with pytest.raises(CalibrationError, match="2 channels"):
        DriftAlarm(np.ones((3, 2))).observe_scores(np.ones((3, 1)))
    (tmp_path / "drift.safetensors").write_bytes(b"not a tensor")
    for name in ("drift.safetensors", "missing.safetensors"):
        with pytest.raises(CalibrationError, match="make it again"):
            DriftAlarm.load(tmp_path / name)
