import numpy as np
import pytest

from controller.base import CONTROLLERS, choose, controller_class
from controller.constant import MixtureController, OracleController
from controller.gbdt import LightGBMController
from controller.mlp import MLPController
from controller.testing import ControllerConformance


class TestLightGBM(ControllerConformance):
    def make(self):
        return LightGBMController(n_trees=30)


class TestMLP(ControllerConformance):
    def make(self):
        return MLPController(epochs=20)


class TestMixture(ControllerConformance):
    def make(self):
        return MixtureController([0.2, 0.3, 0.5])


class TestOracle(ControllerConformance):
    def make(self):
        return OracleController()


@pytest.mark.parametrize("name", ["lightgbm", "mlp"])
def test_learned_controllers_learn(name) -> None:
    suite = ControllerConformance()
    features, sufficient = suite.data(400)
    controller = controller_class(name)()
    controller.fit(features, sufficient, suite.budgets)
    fresh, truth = suite.data(400, seed=1)
    assert ((controller.predict(fresh) > 0.5) == truth).mean() > 0.9


@pytest.mark.parametrize("name", ["lightgbm", "mlp"])
def test_one_class_only_is_learned_too(name) -> None:
    suite = ControllerConformance()
    features, sufficient = suite.data()
    controller = controller_class(name)()
    controller.fit(features, np.ones_like(sufficient), suite.budgets)
    assert (controller.predict(features) > 0.9).all()


def test_lightgbm_is_never_less_sure_of_a_larger_budget() -> None:
    suite = TestLightGBM()
    controller, features = suite.fitted()
    assert (np.diff(controller.predict(features), axis=1) >= 0).all()


def test_oracle_knows_its_prompts_and_no_others() -> None:
    suite = TestOracle()
    features, sufficient = suite.data()
    controller, _ = suite.fitted()
    np.testing.assert_array_equal(controller.predict(features), sufficient)
    assert controller.predict(features + 1)[:, :-1].max() == 0


def test_mixture_draws_with_its_weights() -> None:
    features = np.random.default_rng(0).normal(size=(4000, 3)).astype(np.float32)
    chosen = choose(MixtureController([0.2, 0.3, 0.5]).predict(features), 0.5)
    np.testing.assert_allclose(np.bincount(chosen) / 4000, [0.2, 0.3, 0.5], atol=0.03)
    other = choose(MixtureController([0.2, 0.3, 0.5], seed=1).predict(features), 0.5)
    assert (chosen != other).mean() > 0.4


def test_static_plans_are_mixtures_of_one() -> None:
    features = np.zeros((5, 2), dtype=np.float32)
    assert (choose(MixtureController.static(4, 1).predict(features), 0.5) == 1).all()
    assert (choose(MixtureController.static(4, 3).predict(features), 0.5) == 3).all()


def test_the_decision_is_the_cheapest_plan_that_is_sure_enough() -> None:
    probabilities = np.array([[0.9, 0.1, 1.0], [0.1, 0.6, 1.0], [0.2, 0.3, 1.0], [np.nan, 0.9, 1.0]])
    np.testing.assert_array_equal(choose(probabilities, 0.5), [0, 1, 2, 2])
    np.testing.assert_array_equal(choose(probabilities, float("inf")), [2, 2, 2, 2])


def test_every_registered_name_resolves() -> None:
    assert {controller_class(name).__name__ for name in CONTROLLERS} == {
        "LightGBMController",
        "MLPController",
        "MixtureController",
        "OracleController",
    }
