"""What an oracle could save on these prompts, how sure that is, and the share of it that a policy captures.

Shapes: `N` prompts, `K` plans, cheapest first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from oracle.frontier.bootstrap import REPEATS, bootstrap_interval
from oracle.frontier.frontier import Frontiers, budget_at, equal_mean_budget, least_sufficient, surely_sufficient
from oracle.frontier.split_half import corrected_climb, corrected_path
from oracle.frontier.upgrades import climb

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Choices = NDArray[np.intp]

LEVEL = 0.9
"""Share of redrawn sets of prompts inside an interval."""

FLATTERY = (
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


@dataclass(frozen=True, slots=True)
class FrontierCard:
    """The oracle on N prompts.

    Attributes:
        equal_mean_budget: see `oracle.frontier.frontier.equal_mean_budget`; the interval is of its relaxation.
        own_score_budget: see `oracle.frontier.frontier.own_score_budget`.
        headroom: see `oracle.frontier.frontier.Frontiers.headroom`, in shares of the decoder.
        captured_headroom: see `oracle.frontier.frontier.Frontiers.captured`, of the policy; redrawn
            prompts for which it is not defined are left out of the interval.
        loss: the mean score that the next three are allowed to lose, in shares of the full model's.
        oracle_at_loss: budget of the oracle there.
        corrected_at_loss: budget of the oracle whose picks no luck helps; see `oracle.frontier.split_half`.
        mixture_at_loss: budget of the best mixture of static plans, which knows nothing.
        level: of the intervals.
        repeats: redrawn sets of prompts behind each interval.
        caveat: what the figures leave out, in a sentence.
    """

    equal_mean_budget: Estimate
    own_score_budget: Estimate
    headroom: Estimate
    captured_headroom: Estimate
    loss: float
    oracle_at_loss: Estimate
    corrected_at_loss: Estimate
    mixture_at_loss: Estimate
    level: float
    repeats: int
    caveat: str


def frontier_card(
    chosen: Choices, scores: Floats, sufficient: Bools, budgets: Floats, loss: float = 0.05
) -> FrontierCard:
    """The card of prompts for which a policy runs plan `chosen[i]` [N]; `loss`: see `FrontierCard`."""
    steps, everyone = climb(scores, budgets), np.arange(len(scores))
    own = budgets[least_sufficient(surely_sufficient(sufficient))]
    quality, budget = scores[everyone, chosen], budgets[chosen]

    def frontiers(drawn: Choices) -> Frontiers:
        counts = np.bincount(drawn, minlength=len(scores)).astype(np.float64)
        return Frontiers.of(scores, budgets, steps, counts)

    honest = corrected_climb(scores, budgets)

    def allowed(drawn: Choices) -> float:
        return (1 - loss) * float(scores[drawn, -1].mean())

    def corrected(drawn: Choices) -> float:
        counts = np.bincount(drawn, minlength=len(scores)).astype(np.float64)
        return budget_at(corrected_path(honest, scores, budgets, counts), allowed(drawn))

    def equal_mean(drawn: Choices) -> float:
        found = frontiers(drawn)
        return budget_at(found.oracle, found.full)

    def captured(drawn: Choices) -> float:
        return frontiers(drawn).captured(float(quality[drawn].mean()), float(budget[drawn].mean()))

    return FrontierCard(
        equal_mean_budget=_estimate(equal_mean, everyone, equal_mean_budget(scores, budgets)),
        own_score_budget=_estimate(lambda drawn: float(own[drawn].mean()), everyone),
        headroom=_estimate(lambda drawn: frontiers(drawn).headroom(), everyone),
        captured_headroom=_estimate(captured, everyone),
        loss=loss,
        oracle_at_loss=_estimate(lambda drawn: budget_at(frontiers(drawn).oracle, allowed(drawn)), everyone),
        corrected_at_loss=_estimate(corrected, everyone),
        mixture_at_loss=_estimate(lambda drawn: budget_at(frontiers(drawn).mixture, allowed(drawn)), everyone),
        level=LEVEL,
        repeats=REPEATS,
        caveat=FLATTERY,
    )


def _estimate(statistic: Callable[[Choices], float], everyone: Choices, value: float | None = None) -> Estimate:
    """Of a statistic of the prompts drawn; `value` where it is better known than by the statistic of everyone."""
    low, high = bootstrap_interval(statistic, len(everyone), level=LEVEL)
    numbers = (statistic(everyone) if value is None else value, low, high)
    return Estimate(*(None if np.isnan(number) else number for number in numbers))
