import numpy as np
import pytest

from controller.report.headroom import Estimate, frontier_card
from controller.report.report_card import report_card

BUDGETS = np.array([0.4, 0.7, 1.0])


def test_a_card_says_what_the_oracle_saves_and_how_sure_that_is() -> None:
    """A third of the prompts needs each plan: the oracle needs 0.7, a static mixture the full plan."""
    scores = np.tile([[1.0, 1.0, 1.0], [0.0, 1.0, 1.0], [0.0, 0.0, 1.0]], (100, 1))
    card = frontier_card(np.tile([0, 1, 1], 100), scores, scores == 1, BUDGETS)
    for estimate in (card.equal_mean_budget, card.own_score_budget):
        assert estimate.value == pytest.approx(0.7)
        assert estimate.low < 0.7 < estimate.high
    assert card.headroom.value == pytest.approx(0.3)
    assert card.headroom.low < 0.3 < card.headroom.high
    assert card.headroom.high - card.headroom.low < 0.1
    assert card.oracle_at_loss.value < 0.7 < card.mixture_at_loss.value
    assert card.oracle_at_loss.value < card.corrected_at_loss.value < 1
    report = report_card(np.tile([0, 1, 1], 100), scores, scores == 1, BUDGETS, [4, 7, 10])
    assert card.captured_headroom.value == pytest.approx(report.captured_headroom)
    assert card.captured_headroom.low < report.captured_headroom < card.captured_headroom.high


def test_undefined_figures_are_none() -> None:
    scores = np.ones((20, 3))
    card = frontier_card(np.zeros(20, dtype=int), scores, scores == 1, BUDGETS)
    assert card.captured_headroom == Estimate(None, None, None)
    assert card.headroom == Estimate(0.0, 0.0, 0.0)
    assert card.equal_mean_budget.value == pytest.approx(0.4)
    assert card.own_score_budget.value == pytest.approx(0.4)
