"""The guarantee itself is tested, on cases whose true risk is known in closed form."""

import math

import numpy as np
import pytest
from scipy.stats import binom

from controller.calibration import THRESHOLDS, Certificate, fewest_prompts, p_values, valid_threshold

ALPHA, DELTA = 0.1, 0.1


def losses_of(difficulty: np.ndarray):
    """A prompt of difficulty u in (0, 1) is lost by every threshold below u, so the true risk at t is 1 - t."""
    return lambda threshold: (difficulty > threshold).astype(float)


def test_violations_stay_below_delta() -> None:
    random, runs, violations, used = np.random.default_rng(0), 400, 0, 0
    for _ in range(runs):
        threshold = valid_threshold(losses_of(random.random(200)), ALPHA, DELTA)
        if threshold is not None:
            used += 1
            violations += 1 - threshold > ALPHA
    assert used > 0.95 * runs, "the bound is useless if it is never reached"
    assert violations <= binom.ppf(0.999, runs, DELTA)


def test_the_threshold_nears_the_true_one_with_many_prompts() -> None:
    threshold = valid_threshold(losses_of(np.random.default_rng(0).random(50_000)), ALPHA, DELTA)
    assert threshold is not None
    assert 0.9 <= threshold < 0.92


def test_too_few_prompts_certify_nothing() -> None:
    needed = fewest_prompts(ALPHA, DELTA)
    assert valid_threshold(lambda threshold: np.zeros(needed - 1), ALPHA, DELTA) is None
    assert valid_threshold(lambda threshold: np.zeros(needed), ALPHA, DELTA) == pytest.approx(THRESHOLDS[-1])


def test_fewest_prompts_is_the_closed_form_when_nothing_is_lost() -> None:
    for alpha, delta in [(0.1, 0.1), (0.05, 0.1), (0.02, 0.05), (0.01, 0.05)]:
        assert fewest_prompts(alpha, delta) == math.ceil(math.log(delta) / math.log(1 - alpha))
    assert fewest_prompts(0.1, 0.1, 0.05) > fewest_prompts(0.1, 0.1)
    with pytest.raises(ValueError, match="can never certify"):
        fewest_prompts(0.1, 0.1, 0.1)


def test_p_values_are_never_below_the_exact_binomial_ones() -> None:
    lost = np.arange(0, 21)
    assert (p_values(lost / 200, 200, ALPHA) >= binom.cdf(lost, 200, ALPHA) - 1e-12).all()


@pytest.mark.parametrize(("threshold", "words"), [(0.7, "at most 10.0% of prompts"), (None, "all run the full model")])
def test_certificates_speak_plainly_and_survive_a_file(tmp_path, threshold, words) -> None:
    certificate = Certificate("risk", ALPHA, DELTA, 200, threshold, 0.05, "abc", "2026-01-01", 22)
    assert words in certificate.sentence
    certificate.save(tmp_path / "certificate.json")
    assert Certificate.load(tmp_path / "certificate.json") == certificate
