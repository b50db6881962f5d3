import warnings

import numpy as np
import optuna
import pytest
import torch

from controller.base import CONTROLLERS, LearningError, choose, lost
from controller.models.gbdt import LightGBMController
from controller.models.logistic import LogisticController
from controller.models.mlp import MLPController, soft_regret
from controller.testing import ControllerConformance

LEARNED = ["lightgbm", "mlp", "logistic"]


class TestLightGBM(ControllerConformance):
    def make(self):
        return LightGBMController(n_trees=30)


class TestLightGBMPerPlan(ControllerConformance):
    def make(self):
        return LightGBMController(n_trees=30, per_plan=True)


class TestMLP(ControllerConformance):
    def make(self):
        return MLPController(epochs=20)


class TestOrdinalMLP(ControllerConformance):
    def make(self):
        return MLPController(epochs=20, ordinal=True)


class TestLogistic(ControllerConformance):
    def make(self):
        return LogisticController()


@pytest.mark.parametrize("name", LEARNED)
def test_learned_controllers_learn(name) -> None:
    suite = ControllerConformance()
    features, kept = suite.data(400)
    controller = CONTROLLERS[name]()
    controller.fit(features, kept, suite.budgets)
    fresh, truth = suite.data(400, seed=1)
    assert np.abs(controller.predict(fresh) - truth).mean() < 0.13
    shuffled = CONTROLLERS[name]()
    shuffled.fit(np.random.default_rng(0).permutation(features), kept, suite.budgets)
    assert np.abs(shuffled.predict(fresh) - truth).mean() > 0.2


@pytest.mark.parametrize("name", LEARNED)
def test_one_class_only_is_learned_too(name) -> None:
    suite = ControllerConformance()
    features, kept = suite.data()
    controller = CONTROLLERS[name]()
    controller.fit(features, np.ones_like(kept), suite.budgets)
    assert (controller.predict(features) > 0.9).all()


@pytest.mark.parametrize("name", LEARNED)
def test_constant_features_give_the_mean(name) -> None:
    suite = ControllerConformance()
    features, kept = suite.data(400)
    controller = CONTROLLERS[name]()
    controller.fit(np.ones_like(features), kept, suite.budgets)
    np.testing.assert_allclose(controller.predict(np.ones_like(features))[0], kept.mean(0), atol=0.06)


@pytest.mark.parametrize("name", LEARNED)
def test_a_search_may_begin_with_the_defaults(name) -> None:
    study = optuna.create_study()
    study.enqueue_trial(CONTROLLERS[name].defaults())
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a default outside the range is a warning
        settings = CONTROLLERS[name].suggest(study.ask())
    assert settings
    assert settings.items() <= CONTROLLERS[name].defaults().items()
    CONTROLLERS[name](**settings)


def test_shares_outside_their_range_are_refused() -> None:
    features, kept = ControllerConformance().data()
    with pytest.raises(LearningError, match=r"must lie in \[0, 1\]"):
        LogisticController().fit(features, kept * 2, ControllerConformance.budgets)


def test_lightgbm_never_expects_less_of_a_larger_budget() -> None:
    suite = TestLightGBM()
    controller, features = suite.fitted()
    assert (np.diff(controller.predict(features), axis=1) >= 0).all()


def test_regret_is_least_for_the_true_shares() -> None:
    generator = torch.Generator().manual_seed(0)
    kept = torch.cat([torch.rand(500, 2, generator=generator), torch.ones(500, 1)], dim=1)
    budgets = torch.tensor([0.5, 0.75, 1.0])
    torch.manual_seed(0)
    right = soft_regret(kept[:, :-1], kept, budgets)
    wrong = [
        soft_regret(shares, kept, budgets) for shares in (torch.ones(500, 2), torch.zeros(500, 2), kept[:, [1, 0]])
    ]
    assert all(right < other for other in wrong)


def test_the_decision_weighs_what_is_lost_against_what_is_saved() -> None:
    kept = np.array([[0.9, 0.95, 1.0], [0.1, 0.8, 1.0], [0.2, 0.3, 1.0], [np.nan, 0.9, 1.0], [1.0, 0.5, 1.0]])
    budgets = np.array([0.5, 0.75, 1.0])
    np.testing.assert_array_equal(choose(kept, budgets, 0.0), [0, 0, 0, 2, 0])
    np.testing.assert_array_equal(choose(kept, budgets, 1.0), [0, 1, 2, 2, 0])
    np.testing.assert_array_equal(choose(kept, budgets, 5.5), [2, 2, 2, 2, 0])
    np.testing.assert_array_equal(choose(kept, budgets, 5.1), [2, 2, 2, 2, 0])
    np.testing.assert_array_equal(choose(kept, budgets, 4.9), [0, 2, 2, 2, 0])
    np.testing.assert_array_equal(choose(kept, budgets, float("inf")), [2, 2, 2, 2, 0])
    np.testing.assert_array_equal(choose(kept, budgets, None), [2, 2, 2, 2, 2])


def test_a_plan_that_is_expected_to_win_is_welcome() -> None:
    """The full plan keeps 1/2; what a plan keeps beyond pays for its budget."""
    kept = np.array([[0.6, 0.55, 0.5], [0.45, 0.7, 0.5], [0.45, 0.49, 0.5], [np.inf, 0.9, 0.5]], dtype=np.float32)
    budgets = np.array([0.5, 0.75, 1.0])
    np.testing.assert_allclose(lost(kept[:3]), [[-0.2, -0.1, 0], [0.1, -0.4, 0], [0.1, 0.02, 0]], atol=1e-6)
    np.testing.assert_array_equal(choose(kept, budgets, 0.1), [0, 0, 0, 2])
    np.testing.assert_array_equal(choose(kept, budgets, 4.0), [0, 1, 1, 2])
    np.testing.assert_array_equal(choose(kept, budgets, 100.0), [0, 1, 2, 2])


def test_the_highest_price_follows_no_expected_win_and_lower_ones_ever_more() -> None:
    """What is expected to be won is noise here; still each price lets more prompts leave the full plan."""
    kept = np.random.default_rng(0).normal(0.5, 0.02, (200, 3)).astype(np.float32)
    kept[:, -1] = 0.5
    left = [(choose(kept, np.array([0.5, 0.75, 1.0]), price) < 2).mean() for price in (1000.0, 100.0, 30.0, 10.0, 1.0)]
    assert left[0] == 0
    assert left[-1] == 1
    assert left == sorted(left)
    assert 0 < left[2] < left[3], "by and by"


def test_the_full_plan_keeps_the_same_for_all() -> None:
    features, kept = ControllerConformance().data()
    with pytest.raises(LearningError, match="must keep the same for all"):
        LogisticController().fit(features, kept[:, ::-1], ControllerConformance.budgets)


def test_every_registered_name_resolves() -> None:
    assert {CONTROLLERS[name].__name__ for name in CONTROLLERS} == {
        "LightGBMController",
        "LogisticController",
        "MLPController",
    }
