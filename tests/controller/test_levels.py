"""Several certified levels, and levels above the full model's score, are false as seldom as promised."""

import numpy as np
import pytest
from scipy.stats import binom

from controller.certificate.calibration import PRICES, PricePath, certify, first_price, valid_price

DELTA = 0.1


def answered(random, n: int, kept: float) -> tuple[np.ndarray, np.ndarray]:
    """Scores of the full model, .5 on average, and of a plan whose mean score is `kept` times that."""
    full = (random.random(n) < 0.5).astype(float)
    moved = random.random(n) < 0.3
    return full, np.where(moved, random.random(n) < 0.5 + 0.5 * (kept - 1) / 0.3, full)


FROM, UNTIL = 3, 6


def along(full: np.ndarray, scores: np.ndarray) -> PricePath:
    """The full model at the first prices, then the plan; the other prices are left out, for speed."""
    shortens = np.arange(UNTIL) >= FROM
    return PricePath(np.where(shortens[:, None], full - scores, 0.0), shortens)


LEVELS = (0.97, 1.0, 1.05)
RUNS = 500


def certified_levels(random, n: int, kept: float, levels: tuple[float, ...]) -> list[bool]:
    """Which levels are certified, each test beginning where other prompts of this kind would have it."""
    seen, (full, scores) = answered(random, n, kept), answered(random, n, kept)
    path, found = along(full, scores), []
    for keep in levels:
        start = first_price(along(*seen), round(1 - keep, 9), seen[0])
        terms = {"risk": "mean_score", "full": full, "start": start}
        found.append(valid_price(path, round(1 - keep, 9), DELTA / len(levels), **terms) is not None)
    return found


@pytest.mark.parametrize("keep", LEVELS)
def test_a_level_is_certified_falsely_at_most_delta_of_the_time(keep) -> None:
    """The plan keeps a hair less than the level, and the certificate has one level alone."""
    random = np.random.default_rng(0)
    wrong = sum(certified_levels(random, 200, keep - 0.001, (keep,))[0] for _ in range(RUNS))
    assert RUNS * DELTA / 5 < wrong <= binom.ppf(0.999, RUNS, DELTA), "neither broken nor far from the bound"


@pytest.mark.parametrize("kept", [0.969, 0.999, 1.049])
def test_any_of_several_levels_is_false_at_most_delta(kept) -> None:
    random = np.random.default_rng(1)
    wrong = 0
    for _ in range(RUNS):
        found = certified_levels(random, 200, kept, LEVELS)
        wrong += any(valid for keep, valid in zip(LEVELS, found, strict=True) if keep > kept)
    assert wrong <= binom.ppf(0.999, RUNS, DELTA)


@pytest.mark.parametrize("keep", LEVELS)
def test_a_level_that_is_kept_well_is_certified(keep) -> None:
    random = np.random.default_rng(2)
    assert np.mean([certified_levels(random, 300, keep + 0.15, (keep,))[0] for _ in range(40)]) > 0.8


def test_first_price_has_the_largest_margin() -> None:
    """From the dearest price, which runs the full model, no gain can be certified."""
    full, scores = answered(np.random.default_rng(3), 400, 1.3)
    path = along(full, scores)
    terms = {"delta": DELTA, "risk": "mean_score", "full": full}
    start = first_price(path, -0.05, full)
    assert start == FROM
    assert valid_price(path, -0.05, **terms) is None
    assert valid_price(path, -0.05, start=start, **terms) == PRICES[UNTIL - 1]
    assert first_price(path, 0.03, full) == 0, "the full model keeps 97% of its score"


def test_a_gain_that_is_not_there_is_said_to_be_not_certified() -> None:
    full, scores = answered(np.random.default_rng(4), 200, 0.9)
    terms = {"delta": DELTA, "risk": "mean_score", "tasks": ["a"] * 200, "full": full, "levels": LEVELS}
    found = certify(along(full, scores), keep=1.05, start=FROM, **terms)
    assert (found.price, found.fewest_prompts, found.too_small()) == (None, None, {})
    assert "it wins too little at the first price that shortens any" in found.sentence
    assert "keep at least 105% of the full model's mean score" in found.sentence
    sure = certify(along(full, np.ones(200)), keep=1.05, start=FROM, **terms)
    assert "The levels 97%, 100%, 105% share this confidence: any may be chosen." in sure.sentence
    assert any("All levels together fail with probability delta" in line for line in sure.does_not_cover)
