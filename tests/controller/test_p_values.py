"""Valid on the hardest case, a mean loss of exactly alpha, and useful on the easy ones."""

import math

import numpy as np
import pytest
from mapie.risk_control.methods import compute_hoeffding_bentkus_p_value
from scipy.stats import binom

from controller.certificate.p_values import binomial_p_values, fewest_prompts, martingale_p_values, p_values
from controller.certificate.risks import CalibrationError

ALPHA, DELTA, RUNS, N = 0.05, 0.1, 3000, 200

LOSSES = {  # mean ALPHA exactly
    "small variance": lambda random, size: random.beta(2, 2 / ALPHA - 2, size),
    "skewed": lambda random, size: random.beta(0.2, 0.2 / ALPHA - 0.2, size),
    "uniform": lambda random, size: random.uniform(0, 2 * ALPHA, size),
    "all or nothing": lambda random, size: (random.random(size) < ALPHA).astype(float),
    "constant": lambda random, size: np.full(size, ALPHA),
    "mostly nothing": lambda random, size: np.where(random.random(size) < 2 * ALPHA, random.random(size), 0.0),
}


@pytest.mark.parametrize("kind", LOSSES)
def test_martingale_is_wrong_at_most_delta_of_the_time(kind) -> None:
    losses = LOSSES[kind](np.random.default_rng(0), (RUNS, N))
    values = martingale_p_values(losses, ALPHA, DELTA)
    for level in (0.02, DELTA, 0.3):
        assert (values <= level).sum() <= binom.ppf(0.999, RUNS, level)


def test_martingale_does_not_depend_on_a_sorted_table() -> None:
    losses = np.sort(LOSSES["skewed"](np.random.default_rng(1), (RUNS, N)), axis=1)
    values = martingale_p_values(losses[:, np.random.default_rng(2).permutation(N)], ALPHA, DELTA)
    by_task = martingale_p_values(losses, ALPHA, DELTA)  # easiest first: in this order nearly all win
    for found in (values, by_task):
        assert (found <= DELTA).sum() <= binom.ppf(0.999, RUNS, DELTA)


@pytest.mark.parametrize(("mean", "deviation", "alpha"), [(0.02, 0.03, 0.04), (0.01, 0.01, 0.022)])
def test_martingale_certifies_small_variances(mean, deviation, alpha) -> None:
    shape = (mean / deviation) ** 2
    losses = np.clip(np.random.default_rng(0).gamma(shape, mean / shape, (300, 250)), 0, 1)
    betting = martingale_p_values(losses, alpha, DELTA) <= DELTA
    hoeffding_bentkus = compute_hoeffding_bentkus_p_value(losses.mean(1), 250, alpha)[:, 0] <= DELTA
    assert betting.mean() > 0.95
    assert hoeffding_bentkus.mean() < 0.2


def mean_scores(random, runs: int, n: int, kept: float) -> tuple[np.ndarray, np.ndarray]:
    """Losses [runs, n] and the full model's scores [runs, n]: right or wrong, with a mean of .6; a fifth of the answers
    change, and what is kept of the mean score is exact in expectation."""
    full = (random.random((runs, n)) < 0.6).astype(float)
    changed, right = random.random((runs, n)) < 0.2, 0.6 - 0.6 * (1 - kept) / 0.2
    score = np.where(changed, random.random((runs, n)) < right, full)
    return full - score, full


@pytest.mark.parametrize("alpha", [0.01, 0.03, 0.1])
def test_mean_score_is_certified_falsely_at_most_delta(alpha) -> None:
    losses, full = mean_scores(np.random.default_rng(0), 3000, 150, 1 - alpha)
    values = martingale_p_values((1 + losses - alpha * full) / 2, 0.5, DELTA)
    np.testing.assert_allclose(values[:1], p_values(losses[:1], alpha, DELTA, "mean_score", full[0]))
    for level in (0.02, DELTA, 0.3):
        assert (values <= level).sum() <= binom.ppf(0.999, 3000, level)


def test_a_mean_score_is_certified_where_the_lost_score_never_is() -> None:
    """A fifth of the answers change, for better as often as for worse."""
    losses, full = mean_scores(np.random.default_rng(0), 300, 400, 1.0)
    signed = martingale_p_values((1 + losses - 0.1 * full) / 2, 0.5, DELTA)
    only_lost = p_values(np.maximum(losses, 0), 0.05, DELTA, "score_lost")
    assert (signed <= DELTA).mean() > 0.95
    assert (only_lost <= DELTA).mean() < 0.2


def test_bets_with_a_deadline_beat_constant_bets() -> None:
    """Against the bets of Waudby-Smith and Ramdas, which do not ask what is owned and how many prompts are left."""
    losses, full = mean_scores(np.random.default_rng(1), 400, 300, 1.0)
    terms = (1 + losses - 0.08 * full) / 2
    spread = terms.std(axis=1, keepdims=True)
    bets = np.minimum(0.9 / 0.5, np.sqrt(2 * math.log(1 / DELTA) / terms.shape[1]) / spread)
    of_one_size = np.exp(-np.cumsum(np.log1p(-bets * (terms - 0.5)), axis=1).max(axis=1)) <= DELTA
    assert (martingale_p_values(terms, 0.5, DELTA) <= DELTA).mean() > of_one_size.mean() + 0.02


def test_martingale_stops_near_delta() -> None:
    """Where no answer loses, p-values end just below delta: a level of delta / 4 takes a test of its own."""
    losses = np.zeros((1, 400))
    assert DELTA / 4 < martingale_p_values(losses, ALPHA, DELTA)[0] <= DELTA
    assert martingale_p_values(losses, ALPHA, DELTA / 4)[0] <= DELTA / 4


def test_binomial_p_values_are_the_binomial_tail() -> None:
    for n in (7, 93, N, 250):
        lost = np.arange(0, int(ALPHA * n) + 1)
        values = binomial_p_values((np.arange(n) < lost[:, None]).astype(float), ALPHA)
        np.testing.assert_allclose(values, binom.cdf(lost, n, ALPHA), rtol=1e-9)


def test_fewest_prompts_is_the_closed_form_when_nothing_is_lost() -> None:
    for alpha, delta in [(0.1, 0.1), (0.05, 0.1), (0.02, 0.05), (0.01, 0.05)]:
        assert fewest_prompts(alpha, delta) == math.ceil(math.log(delta) / math.log(1 - alpha))
    assert fewest_prompts(0.1, 0.1, observed_risk=0.05) > fewest_prompts(0.1, 0.1)


@pytest.mark.parametrize("observed", [0.0, 0.01])
def test_fewest_prompts_is_where_the_martingale_certifies(observed) -> None:
    needed = fewest_prompts(0.05, 0.1, "score_lost", observed)
    assert martingale_p_values(np.full((1, needed), observed), 0.05, 0.1) <= 0.1
    assert martingale_p_values(np.full((1, needed - 1), observed), 0.05, 0.1) > 0.1
    assert needed >= fewest_prompts(0.05, 0.1)


def test_fewest_prompts_grows_as_the_full_score_falls() -> None:
    few, many = (fewest_prompts(0.05, DELTA, "mean_score", 0.0, full) for full in (0.8, 0.1))
    assert few < 80 < 8 * few < 1.3 * many
    scores = np.full(few, 0.8)
    assert p_values(np.zeros((1, few)), 0.05, DELTA, "mean_score", scores) <= DELTA
    assert p_values(np.zeros((1, few - 1)), 0.05, DELTA, "mean_score", scores[1:]) > DELTA
    with pytest.raises(CalibrationError, match="takes over 30000 prompts"):
        fewest_prompts(0.05, DELTA, "mean_score", 0.0, 0.0)


def test_the_mean_score_needs_the_full_models() -> None:
    with pytest.raises(CalibrationError, match="score of each of 3 prompts, none were given"):
        p_values(np.zeros((2, 3)), 0.1, 0.1, "mean_score")
    with pytest.raises(CalibrationError, match=r"must lie in \[0, 1\], one of them is 1.5"):
        p_values(np.zeros((2, 3)), 0.1, 0.1, "mean_score", np.array([0, 1.5, 1]))


def test_numbers_that_never_suffice_are_refused() -> None:
    with pytest.raises(CalibrationError, match="can never certify"):
        fewest_prompts(0.1, 0.1, observed_risk=0.1)
    with pytest.raises(CalibrationError, match="takes over"):
        fewest_prompts(0.1, 0.1, observed_risk=0.1 - 1e-9)


@pytest.mark.parametrize(
    ("losses", "alpha", "delta", "risk", "words"),
    [
        ([0.0, 1.0], 0.0, 0.1, "insufficient", "alpha is 0.0"),
        ([0.0, 1.0], -9.0, 0.1, "mean_score", "alpha is -9.0; it must lie between -9.0 and 1"),
        ([0.0, 1.0], 0.1, 1.5, "insufficient", "delta is 1.5"),
        ([0.0, 1.0], 0.1, 0.1, "regret", "no risk 'regret'"),
        ([], 0.1, 0.1, "score_lost", "no calibration prompts"),
        ([0.0, 1.2], 0.1, 0.1, "score_lost", "the first is 1.2"),
        ([0.0, -1.2], 0.1, 0.1, "mean_score", r"outside of \[-1, 1\], the first is -1.2"),
        ([0.0, np.nan], 0.1, 0.1, "score_lost", "the first is nan"),
        ([0.0, 0.5], 0.1, 0.1, "insufficient", "ask for 'score_lost'"),
    ],
)
def test_bad_input_is_one_sentence(losses, alpha, delta, risk, words) -> None:
    with pytest.raises(CalibrationError, match=words):
        p_values(np.array([losses], dtype=float), alpha, delta, risk)
