import numpy as np
import pytest

from controller.report_card import budget_at_losses, report_card, threshold_curve, threshold_losses

BUDGETS = np.array([0.5, 1.0])
SCORES = np.array([[1.0, 1.0], [0.0, 1.0], [0.0, 0.0], [1.0, 1.0]])
SUFFICIENT = SCORES[:, -1:] <= SCORES


def test_a_card_says_quality_budget_and_loss() -> None:
    card = report_card(np.array([0, 0, 0, 1]), SCORES, SUFFICIENT, BUDGETS, [3, 6])
    assert (card.quality, card.budget, card.layers, card.loss) == (0.5, 0.625, 3.75, 0.25)
    assert card.quality_ratio == pytest.approx(0.5 / 0.75)
    assert card.plan_shares == [0.75, 0.25]
    best = report_card(np.array([0, 1, 0, 0]), SCORES, SUFFICIENT, BUDGETS, [3, 6])
    assert best.captured_headroom == pytest.approx(1)


def test_losses_and_curves_follow_the_threshold() -> None:
    probabilities = np.array([[0.9, 1], [0.2, 1], [0.6, 1], [0.7, 1]], dtype=np.float32)
    np.testing.assert_array_equal(threshold_losses(probabilities, SUFFICIENT, 0.5), [0, 0, 0, 0])
    np.testing.assert_array_equal(threshold_losses(probabilities, SUFFICIENT, 0.1), [0, 1, 0, 0])
    curve = threshold_curve(probabilities, SUFFICIENT, SCORES, BUDGETS)
    assert curve[0] == (1.0, 0.75, 0.0)
    assert curve[-1] == (0.5, 0.5, 0.25)
    assert budget_at_losses(probabilities, SUFFICIENT, BUDGETS, [0.0]) == 0.625
    assert budget_at_losses(probabilities, SUFFICIENT, BUDGETS, [0.0, 0.3]) == pytest.approx((0.625 + 0.5) / 2)
