import numpy as np
import pytest

from controller.base import ChoiceRule
from controller.report.headroom import Estimate, captured_by, frontier_card
from controller.report.report_card import price_curve, price_for_loss, regret, report_card

BUDGETS = np.array([0.5, 1.0])
SCORES = np.array([[1.0, 1.0], [0.0, 1.0], [0.0, 0.0], [1.0, 1.0]])
LOSSES = SCORES[:, -1:] - SCORES
PREDICTED = np.array([[0.1, 0], [0.8, 0], [0.4, 0], [0.3, 0]], dtype=np.float32)
RULE, SIGNED = ChoiceRule(BUDGETS, "score_lost"), ChoiceRule(BUDGETS, "mean_score")


def test_a_card_says_quality_budget_and_loss() -> None:
    card = report_card(np.array([0, 0, 0, 1]), SCORES, LOSSES, BUDGETS, [3, 6])
    assert (card.quality, card.budget, card.layers, card.loss) == (0.5, 0.625, 3.75, 0.25)
    assert card.quality_ratio == pytest.approx(0.5 / 0.75)
    assert card.plan_shares == [0.75, 0.25]
    assert (card.worse, card.better) == (0.25, 0)
    assert (card.score_lost, card.score_won) == (pytest.approx(0.25 / 0.75), 0)
    best = report_card(np.array([0, 1, 0, 0]), SCORES, LOSSES, BUDGETS, [3, 6])
    assert best.captured_headroom == pytest.approx(1)


def test_curves_follow_the_price() -> None:
    curve = price_curve(PREDICTED, SCORES, RULE)
    assert curve[0] == (1.0, 0.75)
    assert curve[-1] == (0.5, 0.5)
    assert 0.625 < price_for_loss(PREDICTED, LOSSES, RULE, 0.0) < 0.7
    assert price_for_loss(PREDICTED, LOSSES, RULE, 0.25) == pytest.approx(0.01)
    assert price_for_loss(1 - PREDICTED, LOSSES, RULE, -0.1) is None


def test_losses_of_the_mean_score_are_shares_of_the_full_models() -> None:
    """A plan that wins on one prompt what it loses on another loses nothing, and may be welcome at a higher cost."""
    scores = np.array([[1.0, 0.5], [0.0, 0.5], [0.5, 0.5], [0.25, 0.5]])
    losses = scores[:, -1:] - scores
    card = report_card(np.array([0, 0, 1, 1]), scores, losses, BUDGETS, [3, 6], scale=0.5)
    assert (card.loss, card.quality_ratio) == (0, 1)
    worse = report_card(np.array([0, 0, 0, 0]), scores, losses, BUDGETS, [3, 6], scale=0.5)
    assert worse.loss == pytest.approx(1 - worse.quality_ratio) == pytest.approx(0.125)
    assert price_for_loss(losses.astype(np.float32), losses, SIGNED, 0.0) == pytest.approx(1, abs=0.03)
    assert regret(losses.astype(np.float32), losses, SIGNED, [0.0]) == pytest.approx(0, abs=1e-9)
    blind = np.zeros((4, 2), dtype=np.float32)
    assert regret(blind, losses, SIGNED, [0.0]) == pytest.approx(1 - 0.5625)


def test_regret_is_what_the_oracle_would_have_saved() -> None:
    assert regret(PREDICTED, LOSSES, RULE, [0.0]) == pytest.approx(0, abs=1e-9)
    blind = np.tile(np.array([[0.4, 0.0]], dtype=np.float32), (4, 1))
    assert regret(blind, LOSSES, RULE, [0.0]) == pytest.approx(1 - 0.625)
    assert regret(blind, LOSSES, RULE, [0.25]) == pytest.approx(0)
    assert regret(blind, LOSSES, RULE, [0.0, 0.25]) == pytest.approx((1 - 0.625) / 2)


def test_captured_share_has_interval_and_controls() -> None:
    random = np.random.default_rng(0)
    scores = np.column_stack([random.random(200) < 0.5, np.ones(200)]).astype(float)
    known = np.where(scores[:, 0] == 1, 0, 1)
    half = np.where(random.random(200) < 0.5, known, 1)
    blind = (random.random(200) < 0.5).astype(int)
    found = captured_by({"known": known, "half": half, "blind": blind}, scores, BUDGETS, frozenset({"blind"}))
    assert found["known"].value == pytest.approx(1)
    assert found["half"].low < found["half"].value < found["half"].high < 1
    assert abs(found["blind"].value) < 0.3
    assert found["known"].beats == 1
    assert found["blind"].beats is None


THREE_BUDGETS = np.array([0.4, 0.7, 1.0])


def test_a_card_says_what_the_oracle_saves_and_how_sure_that_is() -> None:
    """A third of the prompts needs each plan: the oracle needs 0.7, a static mixture the full plan."""
    scores = np.tile([[1.0, 1.0, 1.0], [0.0, 1.0, 1.0], [0.0, 0.0, 1.0]], (100, 1))
    card = frontier_card(np.tile([0, 1, 1], 100), scores, scores == 1, THREE_BUDGETS)
    for estimate in (card.equal_mean_budget, card.own_score_budget):
        assert estimate.value == pytest.approx(0.7)
        assert estimate.low < 0.7 < estimate.high
    assert card.headroom.value == pytest.approx(0.3)
    assert card.headroom.low < 0.3 < card.headroom.high
    assert card.headroom.high - card.headroom.low < 0.1
    assert card.oracle_at_loss.value < 0.7 < card.mixture_at_loss.value
    assert card.oracle_at_loss.value < card.corrected_at_loss.value < 1
    report = report_card(np.tile([0, 1, 1], 100), scores, 1.0 - scores, THREE_BUDGETS, [4, 7, 10])
    assert card.captured_headroom.value == pytest.approx(report.captured_headroom)
    assert card.captured_headroom.low < report.captured_headroom < card.captured_headroom.high


def test_undefined_figures_are_none() -> None:
    scores = np.ones((20, 3))
    card = frontier_card(np.zeros(20, dtype=int), scores, scores == 1, THREE_BUDGETS)
    assert card.captured_headroom == Estimate(None, None, None)
    assert card.headroom == Estimate(0.0, 0.0, 0.0)
    assert card.equal_mean_budget.value == pytest.approx(0.4)
    assert card.own_score_budget.value == pytest.approx(0.4)
