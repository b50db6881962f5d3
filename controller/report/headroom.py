"""Headroom of an oracle, its captured share, and gains over rivals, with intervals.

Shapes: `N` prompts, `K` plans, cheapest first, the last full, `T` prices of a rival, or its plans.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from oracle.frontier.bootstrap import REPEATS as FRONTIER_REPEATS
from oracle.frontier.bootstrap import bootstrap_interval, percentile_interval
from oracle.frontier.frontier import (
    Frontiers,
    budget_at,
    equal_mean_budget,
    least_sufficient,
    surely_sufficient,
    upper_hull,
)
from oracle.frontier.split_half import corrected_path, corrected_sweep
from oracle.frontier.sweep import sweep

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Choices = NDArray[np.intp]

LEVEL, REPEATS = 0.9, 400
"""Share of redrawn sets of prompts inside an interval, and the sets behind those of `captured_by` and `gains`."""

CAVEAT = (
    "Every prompt was scored once under every plan, and the oracle picks with these scores in hand: an answer that is "
    "right by luck counts as its skill, so its figures flatter, and the intervals do not cover that. The corrected "
    "oracle picks a plan by the prompt's scores under the other plans alone; where no score is luck it is too strict."
)


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value and its bootstrap interval over prompts; None where it is not defined."""

    value: float | None
    low: float | None
    high: float | None

    @classmethod
    def of(cls, value: float, interval: tuple[float, float]) -> Estimate:
        """From numbers that are NaN where they are not defined."""
        return cls(*(None if np.isnan(number) else float(number) for number in (value, *interval)))


@dataclass(frozen=True, slots=True)
class FrontierCard:
    """The oracle on N prompts.

    Attributes:
        equal_mean_budget: see `oracle.frontier.frontier.equal_mean_budget`; the interval is of its relaxation.
        own_score_budget: see `oracle.frontier.frontier.own_score_budget`.
        headroom: see `oracle.frontier.frontier.Frontiers.headroom`, in shares of the decoder.
        captured_headroom: see `oracle.frontier.frontier.Frontiers.captured`, of the policy; redrawn prompts for which
            it is not defined are left out of the interval.
        loss: mean loss that the next three may have, in shares of the full model's mean score.
        oracle_at_loss: budget of the oracle there.
        corrected_at_loss: budget of the oracle whose picks no luck helps; see `oracle.frontier.split_half`.
        mixture_at_loss: budget of the best mixture of static plans.
        level: of the intervals.
        repeats: redrawn sets of prompts behind each interval.
        caveat: limits of the figures, in words.
    """

    equal_mean_budget: Estimate
    own_score_budget: Estimate
    headroom: Estimate
    captured_headroom: Estimate
    loss: float
    oracle_at_loss: Estimate
    corrected_at_loss: Estimate
    mixture_at_loss: Estimate
    level: float = LEVEL
    repeats: int = FRONTIER_REPEATS
    caveat: str = CAVEAT


def frontier_card(
    chosen: Choices, scores: Floats, sufficient: Bools, budgets: Floats, loss: float = 0.05
) -> FrontierCard:
    """The card of prompts for which a policy runs plan `chosen[i]` [N]; `loss`: see `FrontierCard`."""
    steps, corrected_steps = sweep(scores, budgets), corrected_sweep(scores, budgets)
    everyone = np.arange(len(scores))
    own = budgets[least_sufficient(surely_sufficient(sufficient))]
    quality, budget = scores[everyone, chosen], budgets[chosen]

    def frontiers(drawn: Choices) -> Frontiers:
        return Frontiers.of(scores, budgets, steps, _counts(drawn, len(scores)))

    def corrected(drawn: Choices) -> Floats:
        return corrected_path(corrected_steps, scores, budgets, _counts(drawn, len(scores)))

    def at_loss(curve: Callable[[Choices], Floats | Sequence[tuple[float, float]]]) -> Estimate:
        return estimate(lambda drawn: budget_at(curve(drawn), (1 - loss) * float(scores[drawn, -1].mean())))

    def equal_mean(drawn: Choices) -> float:
        found = frontiers(drawn)
        return budget_at(found.oracle, found.full)

    def estimate(statistic: Callable[[Choices], float], value: float | None = None) -> Estimate:
        """Of a statistic of the prompts drawn; `value` where it is known better."""
        interval = bootstrap_interval(statistic, len(everyone), level=LEVEL)
        return Estimate.of(statistic(everyone) if value is None else value, interval)

    return FrontierCard(
        equal_mean_budget=estimate(equal_mean, equal_mean_budget(scores, budgets)),
        own_score_budget=estimate(lambda drawn: float(own[drawn].mean())),
        headroom=estimate(lambda drawn: frontiers(drawn).headroom()),
        captured_headroom=estimate(
            lambda drawn: frontiers(drawn).captured(float(quality[drawn].mean()), float(budget[drawn].mean()))
        ),
        loss=loss,
        oracle_at_loss=at_loss(lambda drawn: frontiers(drawn).oracle),
        corrected_at_loss=at_loss(corrected),
        mixture_at_loss=at_loss(lambda drawn: frontiers(drawn).mixture),
    )


def _counts(drawn: Choices, n: int) -> Floats:
    """Draws of each of n prompts."""
    return np.bincount(drawn, minlength=n).astype(np.float64)


@dataclass(frozen=True, slots=True)
class Captured(Estimate):
    """The captured share of the headroom at a policy's own mean score.

    Attributes:
        beats: share of the redrawn sets of prompts in which it captures more than the best control there; None for the
            controls.
    """

    beats: float | None = None


def captured_by(
    policies: Mapping[str, Choices], scores: Floats, budgets: Floats, controls: frozenset[str] = frozenset()
) -> dict[str, Captured]:
    """The captured share of each policy, which are choices of plans [N], on the same redraws."""
    steps, everyone = sweep(scores, budgets), np.arange(len(scores))
    outcomes = {name: (scores[everyone, chosen], budgets[chosen]) for name, chosen in policies.items()}

    def captured(drawn: Choices) -> dict[str, float]:
        found = Frontiers.of(scores, budgets, steps, _counts(drawn, len(scores)))
        return {
            name: found.captured(float(quality[drawn].mean()), float(budget[drawn].mean()))
            for name, (quality, budget) in outcomes.items()
        }

    random = np.random.default_rng(0)
    draws = [captured(random.integers(0, len(scores), len(scores))) for _ in range(REPEATS)]
    values, redrawn = captured(everyone), {name: np.array([draw[name] for draw in draws]) for name in policies}
    ranked = {name: np.nan_to_num(drawn, nan=-np.inf) for name, drawn in redrawn.items()}
    rivals = [ranked[name] for name in policies if name in controls]
    found = {}
    for name in policies:
        own = Estimate.of(values[name], percentile_interval(redrawn[name], LEVEL))
        is_rival = bool(rivals) and name not in controls
        beats = float((ranked[name] > np.max(rivals, axis=0)).mean()) if is_rival else None
        found[name] = Captured(own.value, own.low, own.high, beats)
    return found


@dataclass(frozen=True, slots=True)
class Curve:
    """Budgets and scores of a rival at each of its prices [T, N]."""

    budgets: Floats
    scores: Floats


@dataclass(frozen=True, slots=True)
class Gain:
    """Gain over one rival; above 0 the policy is better.

    Attributes:
        budget_saved: share of the decoder that the rival runs in addition at the policy's mean score, or at its own
            best score if that is lower.
        score_gained: score that the policy has in addition at the rival's budget, in shares of the full score.
    """

    budget_saved: Estimate
    score_gained: Estimate


def gains(budgets: Floats, scores: Floats, full: Floats, rivals: Mapping[str, Curve]) -> dict[str, Gain]:
    """Gain over each rival, whose prices may be mixed at random.

    Args:
        budgets: of the policy for each prompt [N].
        scores: of the policy [N].
        full: of the full model [N].
        rivals: by name.
    """
    n, random = len(budgets), np.random.default_rng(0)
    weights = [np.bincount(random.integers(0, n, n), minlength=n) / n for _ in range(REPEATS)]

    def figures(rival: Curve, weight: Floats) -> tuple[float, float]:
        hull = np.array(upper_hull(list(zip(rival.budgets @ weight, rival.scores @ weight, strict=True))))
        budget, score = float(budgets @ weight), float(scores @ weight)
        saved = budget_at(hull, min(score, float(hull[-1, 1]))) - budget
        gained = (score - float(np.interp(budget, *hull.T))) / max(float(full @ weight), 1e-12)
        return saved, gained

    found = {}
    for name, rival in rivals.items():
        values, drawn = figures(rival, np.full(n, 1 / n)), np.array([figures(rival, weight) for weight in weights])
        pairs = zip(values, drawn.T, strict=True)
        found[name] = Gain(*(Estimate.of(value, percentile_interval(column, LEVEL)) for value, column in pairs))
    return found
