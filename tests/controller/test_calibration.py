"""The guarantee itself is tested, on cases whose true risk is known in closed form."""

import numpy as np
import pytest
from scipy.stats import binom

from controller.certificate.calibration import (
    PRICES,
    PricePath,
    certify,
    cheapest_valid_plan,
    price_p_values,
    valid_price,
)
from controller.certificate.p_values import fewest_prompts, p_values
from controller.certificate.risks import CalibrationError, group_means

ALPHA, DELTA = 0.1, 0.1


def share_of(price: float) -> float:
    """0 at the safest price, 1 at the lowest."""
    return float(np.log(PRICES[0] / price) / np.log(PRICES[0] / PRICES[-1]))


def path_of(losses, shortens=None) -> PricePath:
    """From price -> losses [n]; every price shortens unless said otherwise."""
    values = np.stack([losses(float(price)) for price in PRICES])
    return PricePath(values, np.ones(len(PRICES), dtype=bool) if shortens is None else shortens)


def counted(difficulty: np.ndarray) -> PricePath:
    """A prompt of difficulty u in (0, 1) is lost by every price with a share above u, so the true risk is the share."""
    return path_of(lambda price: (difficulty < share_of(price)).astype(float))


def lost(size: np.ndarray):
    """A prompt loses 0.4 share(price) u where u has mean 1/2 and a small variance: the true risk is share / 5."""
    return path_of(lambda price: 0.4 * share_of(price) * size)


def violations(runs: int, price_of, risk_of) -> tuple[int, int]:
    prices = [price for price in (price_of() for _ in range(runs)) if price is not None]
    return len(prices), sum(risk_of(price) > ALPHA for price in prices)


def test_counted_losses_exceed_alpha_at_most_delta_of_the_time() -> None:
    random = np.random.default_rng(0)
    used, broken = violations(300, lambda: valid_price(counted(random.random(200)), ALPHA, DELTA), share_of)
    assert used > 290, "the bound is useless if it is never reached"
    assert 0 < broken <= binom.ppf(0.999, 300, DELTA)


def test_lost_scores_exceed_alpha_at_most_delta_of_the_time() -> None:
    random = np.random.default_rng(0)
    used, broken = violations(
        300,
        lambda: valid_price(lost(random.beta(0.3, 0.3, 200)), ALPHA, DELTA, risk="score_lost"),
        lambda price: share_of(price) / 5,
    )
    assert used > 290
    assert broken <= binom.ppf(0.999, 300, DELTA)


def wins_and_losses(full: np.ndarray, moved: np.ndarray, won: np.ndarray):
    """At a share s of the prices, s of the answers change; a changed one is right with a probability of 1/2, as the
    full model's are of .6: the true risk is s (.6 - .5) / .6, in shares of the full model's mean score."""

    def losses(price: float) -> np.ndarray:
        return np.where(moved < share_of(price), full - won, 0.0)

    return path_of(losses)


def test_mean_scores_break_the_bound_at_most_delta() -> None:
    random, n, alpha = np.random.default_rng(0), 300, 0.06

    def price() -> float | None:
        full, won = (random.random(n) < 0.6).astype(float), (random.random(n) < 0.5).astype(float)
        return valid_price(wins_and_losses(full, random.random(n), won), alpha, DELTA, risk="mean_score", full=full)

    prices = [found for found in (price() for _ in range(150)) if found is not None]
    broken = sum(share_of(found) / 6 > alpha for found in prices)
    assert len(prices) > 140, "the bound is useless if it is never reached"
    assert 0 < broken <= binom.ppf(0.999, 150, DELTA)


def test_task_losses_are_shares_of_the_task_full_score() -> None:
    """Both tasks lose .02 of a score on average; of a mean score of .9 that is within 5%, of .2 it is not."""
    tasks = np.array(["able", "unable"] * 1000)
    full = np.where(tasks == "able", 0.9, 0.2)
    terms = {"keep": 0.95, "delta": DELTA, "risk": "mean_score", "tasks": tasks, "full": full}
    losses = path_of(lambda price: np.where(np.arange(2000) % 10 < 5, 0.04, 0.0))
    overall, each = certify(losses, **terms), certify(losses, **terms, per_task=True)
    assert overall.observed_risk == pytest.approx(0.02 / 0.55)
    assert (overall.price, each.price) == (PRICES[-1], None)


def test_certify_says_how_many_prompts_it_would_take() -> None:
    random = np.random.default_rng(0)
    full = (random.random(300) < 0.6).astype(float)
    change = random.permutation(np.repeat([-1.0, 1.0, 0.0], [30, 30, 240])) * 0.5

    def certificate(losses, full=full):
        return certify(
            path_of(lambda price: losses),
            keep=0.98,
            delta=DELTA,
            risk="mean_score",
            tasks=["a"] * len(full),
            full=full,
        )

    noisy, worse, low = certificate(change), certificate(change + 0.1), certificate(np.zeros(300), np.zeros(300))
    assert noisy.price is worse.price is low.price is None
    assert noisy.prompts_needed in range(600, 4000)
    assert f"it takes about {noisy.prompts_needed}" in noisy.sentence
    assert "loses too much at the first price that shortens any" in worse.sentence
    assert "mean score on the 300 calibration prompts is 0, too near 0" in low.sentence


def test_the_price_nears_the_true_one_with_many_prompts() -> None:
    random = np.random.default_rng(0)
    by_count = valid_price(counted(random.random(50_000)), ALPHA, DELTA)
    by_score = valid_price(lost(random.random(5_000)), ALPHA, DELTA, risk="score_lost")
    assert by_count is not None
    assert 0.085 < share_of(by_count) <= 0.1
    assert by_score is not None
    assert 0.095 < share_of(by_score) / 5 <= 0.1


def test_valid_price_stops_at_the_first_failure() -> None:
    assert (np.diff(PRICES) < 0).all()
    hump = path_of(lambda price: np.full(100, float(0.3 < share_of(price) < 0.4)))
    price = valid_price(hump, ALPHA, DELTA)
    assert price is not None
    assert share_of(price) <= 0.3


def test_the_bound_of_every_task_is_that_of_the_hardest() -> None:
    random = np.random.default_rng(0)
    tasks = np.array(["easy", "hard"] * 400)
    ease = np.where(tasks == "easy", 10.0, 1.0)  # risk: share / 10 and share

    def price_of():
        return valid_price(counted(random.random(800) * ease), ALPHA, DELTA, tasks)

    used, broken = violations(150, price_of, share_of)
    assert used > 145
    assert broken <= binom.ppf(0.999, 150, DELTA)
    overall = valid_price(counted(random.random(800) * ease), ALPHA, DELTA)
    assert overall is not None
    assert share_of(overall) > ALPHA, "the mean hides the hard task"


def test_a_task_is_tested_as_if_it_were_alone() -> None:
    losses = (np.random.default_rng(0).random((3, 300)) < 0.03).astype(float)
    tasks = np.array(["a", "b", "b"] * 100)
    alone = [price_p_values(losses[:, tasks == task], ALPHA, DELTA, "insufficient") for task in "ab"]
    np.testing.assert_array_equal(price_p_values(losses, ALPHA, DELTA, "insufficient", tasks), np.max(alone, axis=0))
    with pytest.raises(CalibrationError, match="3 task names were given for 300 prompts"):
        price_p_values(losses, ALPHA, DELTA, "insufficient", ["a", "b", "b"])


@pytest.mark.parametrize("risk", ["insufficient", "score_lost"])
def test_certify_names_the_fewest_prompts(risk) -> None:
    needed = fewest_prompts(ALPHA, DELTA, risk)

    def certificate(n, **options):
        tasks = ["a"] * (n - 5) + ["b"] * 5
        return certify(
            path_of(lambda price: np.zeros(n)), keep=1 - ALPHA, delta=DELTA, risk=risk, tasks=tasks, **options
        )

    enough, few, few_of_b = certificate(needed), certificate(needed - 1), certificate(100, per_task=True)
    assert (enough.price, few.price, few_of_b.price) == (PRICES[-1], None, None)
    assert f"takes at least {needed} calibration prompts, and there are {needed - 1}" in few.sentence
    assert f"takes at least {needed} calibration prompts of each task ('b' has 5)" in few_of_b.sentence
    assert few_of_b.too_small() == {"b": 5}


def test_a_certificate_says_what_was_seen_in_each_task() -> None:
    tasks = np.array(["a"] * 100 + ["b"] * 100)
    losses = 0.02 * (tasks == "b")
    found = certify(
        path_of(lambda price: losses), keep=1 - ALPHA, delta=DELTA, risk="score_lost", tasks=tasks, per_task=True
    )
    assert found.per_task == {
        "a": {"n": 100, "observed_risk": 0.0},
        "b": {"n": 100, "observed_risk": pytest.approx(0.02)},
    }
    assert found.observed_risk == pytest.approx(0.01)
    assert (found.n, found.price, found.fewest_prompts) == (200, PRICES[-1], fewest_prompts(ALPHA, DELTA, "score_lost"))


@pytest.mark.parametrize("risk", ["insufficient", "score_lost"])
def test_the_cheapest_valid_plan_is_wrong_as_seldom_as_promised(risk) -> None:
    """Eight plans, all of which lose a little more than the bound: none may be picked in more than delta of the draws.
    To pick among tests of each plan for itself is wrong more often."""
    random, alpha, delta, runs = np.random.default_rng(0), 0.1, 0.1, 400
    wrong = separately = 0
    for _ in range(runs):
        losses = np.column_stack([(random.random((150, 8)) < alpha * 1.02).astype(float), np.zeros(150)])
        wrong += cheapest_valid_plan(losses, alpha, delta, risk, expected=np.arange(9.0)) < 8
        separately += bool((p_values(losses[:, :8].T, alpha, delta, risk) <= delta).any())
    assert wrong <= binom.ppf(0.999, runs, delta)
    assert separately > binom.ppf(0.999, runs, delta)


@pytest.mark.parametrize(
    ("losses", "expected", "plan"),
    [
        ([0.5, 0.01, 0.0], [0.5, 0.01, 0.0], 1),
        ([0.0, 0.5, 0.0], [0.0, 0.5, 0.0], 0),  # from the largest down nothing was found here
        ([0.0, 0.5, 0.0], [0.2, 0.1, 0.3], 3),  # a wrong order costs power
        ([0.01, 0.0, 0.5], [0.01, 0.0, 0.5], 0),
        ([0.5, 0.5, 0.5], [0.1, 0.2, 0.3], 3),
        ([], [], 0),
    ],
)
def test_the_cheapest_valid_plan_is_found_in_any_order(losses, expected, plan) -> None:
    tested = np.tile([*losses, 0.0], (200, 1))
    assert cheapest_valid_plan(tested, 0.1, 0.1, "score_lost", expected=np.array([*expected, 0.0])) == plan


def from_place(place: int) -> np.ndarray:
    return np.arange(len(PRICES)) >= place


@pytest.mark.parametrize(
    ("loss", "shortens", "price", "words"),
    [
        (0.5, from_place(100), None, "nor would many more like them: it loses too much at the first price that"),
        (0.0, from_place(len(PRICES)), None, "the controller chooses the full plan for all 200 calibration prompts"),
        (0.0, from_place(100), PRICES[-1], "With 90% confidence"),
        (0.02, from_place(100), None, "at the spread of what they lose it takes about 300"),
    ],
)
def test_a_price_that_shortens_nothing_is_no_certificate(loss, shortens, price, words) -> None:
    """Losses begin where something is shortened; the number needed is counted there."""
    won = np.tile([1.0, -1.0, 0.0, 0.0], 50) * (loss == 0.02)
    path = PricePath(np.where(shortens[:, None], loss + 0.5 * won, 0.0), shortens)
    full = np.full(200, 0.5)
    found = certify(path, keep=0.9, delta=DELTA, risk="mean_score", tasks=["a"] * 200, full=full)
    assert found.price == price
    assert words in found.sentence


COPIES = 20


@pytest.mark.parametrize("risk", ["insufficient", "score_lost", "mean_score"])
@pytest.mark.parametrize("per_task", [False, True])
def test_copies_of_a_group_add_no_confidence(risk, per_task) -> None:
    """Copies change nothing: neither the price, nor what is said of it, but for the number of prompts."""
    random, n = np.random.default_rng(0), 200
    difficulty = random.random(n)
    losses = np.array([0.9 * (difficulty < share_of(price)) for price in PRICES])
    full, tasks = np.ones(n), random.choice(["a", "b"], n)
    if risk == "insufficient":
        losses = np.ceil(losses)
    terms = {"keep": 0.8, "delta": DELTA, "risk": risk, "per_task": per_task}
    shortens = from_place(1)
    copied = np.repeat(np.arange(n), COPIES)
    one = certify(PricePath(losses, shortens), tasks=tasks, full=full, **terms)
    path = PricePath(losses[:, copied], shortens)
    many = certify(path, tasks=tasks[copied], full=full[copied], groups=copied, **terms)
    assert (many.n, many.groups, one.groups) == (n * COPIES, n, None)
    assert "of 200 groups, each of which counts once" in many.sentence
    assert many.price is not None
    if risk != "insufficient":  # where one is a count, and many a mean
        assert many.price == one.price
        assert many.observed_risk == pytest.approx(one.observed_risk)
        assert [seen["n"] for seen in many.per_task.values()] == [seen["n"] for seen in one.per_task.values()]


def test_groups_are_means_in_the_order_of_their_first_prompts() -> None:
    losses, full = np.array([[1.0, 0.0, 0.5, 0.0]]), np.array([1.0, 0.0, 0.5, 1.0])
    names = ["b", "a", "b", "b"]
    means, risk, tasks, scores = group_means(losses, "insufficient", names, None, full)
    np.testing.assert_array_equal(means, [[0.5, 0.0]])
    np.testing.assert_allclose(scores, [2.5 / 3, 0.0])
    assert (risk, tasks) == ("score_lost", None)
    means, _, tasks, _ = group_means(losses, "mean_score", names, ["x", "x", "y", "x"], full)
    np.testing.assert_array_equal(means, [[0.5, 0.0, 0.5]])
    assert tasks.tolist() == ["x", "x", "y"]
    with pytest.raises(CalibrationError, match="2 groups were given for 4 prompts"):
        group_means(losses, "mean_score", ["a", "b"])
