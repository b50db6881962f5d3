"""The outlier test keeps its rate on prompts like the held ones, tells others, and survives a file."""

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from controller.base import ChoiceRule, LearningError
from controller.certificate.outliers import OutlierTest
from controller.learning import Settings, learn

SETS, RATE = ("states",), 0.1


def prompts(random: np.random.Generator, n: int, shift: float = 0.0) -> dict[str, np.ndarray]:
    """Two kinds of prompts, and with a shift others."""
    states = random.normal(size=(n, 8)) + 6 * random.integers(0, 2, (n, 1))
    states[:, 0] += shift
    return {"states": states.astype(np.float32), "length": random.normal(size=(n, 1)).astype(np.float32)}


def fitted(seed: int = 0, held: int = 60, rate: float = RATE) -> OutlierTest:
    random = np.random.default_rng(seed)
    return OutlierTest.fit(prompts(random, 100), prompts(random, held), SETS, rate, 2)


def test_outlier_share_of_ordinary_prompts_is_the_rate() -> None:
    """On average over draws of the held prompts: with 60 of them, between rate - 1 / 61 and rate."""
    shares = [fitted(seed).are_outliers(prompts(np.random.default_rng(seed + 1000), 200)).mean() for seed in range(80)]
    error = np.std(shares) / np.sqrt(len(shares))
    assert RATE - 1 / 61 - 3 * error < np.mean(shares) < RATE + 3 * error


def test_outlier_threshold_ignores_references() -> None:
    """The threshold is not made from prompts that the scorer saw: with 11 components of 12 prompts these lie close."""
    random, shares = np.random.default_rng(0), []
    for _ in range(150):
        found = OutlierTest.fit(prompts(random, 12), prompts(random, 39), SETS, RATE, 11)
        shares.append(found.are_outliers(prompts(random, 100)).mean())
    assert np.mean(shares) < RATE + 3 * np.std(shares) / np.sqrt(len(shares))


def test_prompts_unlike_all_are_told_also_between_the_kinds() -> None:
    found, random = fitted(), np.random.default_rng(5)
    assert found.are_outliers(prompts(random, 100, shift=60)).mean() > 0.95
    between = prompts(random, 100)
    between["states"] = (3 + 0.2 * random.normal(size=(100, 8))).astype(np.float32)
    assert found.are_outliers(between).mean() > 0.9


def test_outlier_test_takes_nan_for_one() -> None:
    some = prompts(np.random.default_rng(1), 5)
    some["states"][2, 3] = np.nan
    assert fitted(held=500).are_outliers(some)[2]


def test_outlier_test_with_few_held_out_prompts_finds_none() -> None:
    found = fitted(held=8)
    assert found.threshold == np.inf
    assert not found.are_outliers(prompts(np.random.default_rng(1), 50, shift=100)).any()
    assert "8 prompts of the split tune are too few for a rate of 0.1" in found.description
    assert fitted(held=9).threshold < np.inf


def test_outliers_get_the_full_plan_whatever_the_controller_says() -> None:
    random = np.random.default_rng(0)
    features = prompts(random, 100)
    losses, rule = np.column_stack([np.full(100, -0.8), np.zeros(100)]), ChoiceRule(np.array([0.5, 1.0]), "mean_score")
    learned = learn(Settings("logistic", SETS, 2), features, losses, rule.budgets)
    with_test = type(learned)(learned.projection, learned.controller, fitted())
    strange = prompts(random, 50, shift=60)
    assert (rule.choose(learned.predict(strange), 1.0) == 0).all()
    assert (rule.choose(with_test.predict(strange), 1.0) == 1).mean() > 0.95
    like = prompts(random, 50)
    kept_plans = with_test.predict(like)
    sent = with_test.outliers.are_outliers(like)
    np.testing.assert_array_equal(kept_plans[~sent], learned.predict(like)[~sent])


def test_a_saved_test_decides_the_same(tmp_path) -> None:
    found, some = fitted(), prompts(np.random.default_rng(3), 50, shift=12)
    found.save(tmp_path / "outliers.safetensors")
    again = OutlierTest.load(tmp_path / "outliers.safetensors")
    np.testing.assert_array_equal(found.scores(some), again.scores(some))
    assert (again.threshold, again.rate, again.held) == (found.threshold, found.rate, found.held)
    fitted(held=3).save(tmp_path / "none.safetensors")
    assert OutlierTest.load(tmp_path / "none.safetensors").threshold == np.inf


@pytest.mark.parametrize(
    ("change", "about", "message"),
    [
        (lambda t: {**t, "references": t["references"][:, 1:]}, None, "references are not finite float32 rows"),
        (lambda t: {**t, "references": t["references"] * np.nan}, None, "references are not finite float32 rows"),
        (lambda t: {**t, "references": t["references"][:0]}, None, "references are not finite float32 rows"),
        (lambda t: {**t, "threshold": -t["threshold"]}, None, "its threshold is -.*, not a distance"),
        (lambda t: {**t, "threshold": t["threshold"] * np.nan}, None, "its threshold is nan, not a distance"),
        (lambda t: {**t, "mean": t["mean"][1:]}, None, "holds no projection"),
        (lambda t: {name: t[name] for name in t if name != "scale"}, None, "holds no outlier test"),
        (lambda t: t, '{"sets": ["states"], "rate": 2.0, "held": 60}', "its rate is 2.0, not in"),
        (lambda t: t, '{"sets": ["states"], "rate": 0.1, "held": "60"}', "its number of prompts '60', not an integer"),
        (lambda t: t, '{"sets": ["moods"], "rate": 0.1, "held": 60}', "unknown features 'moods'"),
        (lambda t: t, "{", "holds no outlier test"),
        (lambda t: t, "[]", "holds no outlier test"),
    ],
)
def test_a_file_that_says_something_odd_is_refused(tmp_path, change, about, message) -> None:
    path = tmp_path / "outliers.safetensors"
    fitted().save(path)
    with safe_open(path, "numpy") as file:
        metadata = file.metadata()
    arrays = {name: np.ascontiguousarray(array) for name, array in change(load_file(path)).items()}
    save_file(arrays, path, metadata if about is None else {"test": about})
    with pytest.raises(LearningError, match=message):
        OutlierTest.load(path)
