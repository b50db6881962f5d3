import sys
import warnings
from dataclasses import replace

import lightgbm
import numpy as np
import optuna
import pytest
import torch

from controller.base import CONTROLLERS, ChoiceRule, LearningError, LossRange
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


@pytest.mark.parametrize("n", [30, 300])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"per_plan": False},
        {"n_trees": 300, "n_leaves": 24, "min_leaf_rows": 5, "l2": 0.1, "learning_rate": 0.2},
        {"n_trees": 300, "n_leaves": 24, "min_leaf_rows": 5, "per_plan": False},
        {"n_leaves": 200, "min_leaf_rows": 1, "l2": 0.0, "feature_share": 1.0},
    ],
)
def test_trees_predict_bit_for_bit_as_lightgbm(monkeypatch, tmp_path, settings, n) -> None:
    """Whatever the settings; with few prompts some models are a single leaf, some have fewer trees than asked for."""
    boosters, train = [], lightgbm.train

    def remembering(*arguments, **options):
        boosters.append(train(*arguments, **options))
        return boosters[-1]

    monkeypatch.setattr(lightgbm, "train", remembering)
    random, tiny = np.random.default_rng(n), np.float32(1e-35)
    features = random.normal(size=(n, 12)).astype("float32")
    features[:, 3], features[:, 4] = np.round(features[:, 3]), 0.0
    features[:9, 2] = [tiny, tiny, tiny, -tiny, -tiny, -tiny, 1e-40, -1e-40, 0]
    noise = random.normal(size=(n, 3)) * 0.3
    losses = np.clip(np.array([1.5, -0.5, -99]) - features[:, :1] * 2 + noise, 0, 1).astype("float32")
    controller = LightGBMController(**settings)
    controller.fit(features, losses, ControllerConformance.budgets)
    huge = np.full((2, 12), 3e38, "float32") * [[1], [-1]]
    fresh = np.concatenate([features, features * 3, features[::-1] * tiny, huge.astype("float32")])
    rows = fresh if settings.get("per_plan", True) else controller._rows(fresh)
    expected = np.stack([booster.predict(rows, num_threads=1) for booster in boosters], axis=1)
    assert len(np.unique(expected)) > 2 if n > 30 else len(boosters) > 0
    np.testing.assert_array_equal(controller._forest(rows), expected)
    np.testing.assert_array_equal(np.concatenate([controller._forest(row[None]) for row in rows[:40]]), expected[:40])
    controller.save(tmp_path)
    monkeypatch.setitem(sys.modules, "lightgbm", None)  # from here on it cannot be imported
    loaded = LightGBMController.load(tmp_path)
    np.testing.assert_array_equal(loaded._forest(rows), expected)


def test_trees_that_would_not_load_again_are_not_trained(monkeypatch) -> None:
    features, losses = ControllerConformance().data()
    monkeypatch.setattr("controller.models.gbdt.MOST_DEPTH", 2)
    with pytest.raises(LearningError, match=r"a depth of more than 2; train with smaller ones \(n_leaves\)"):
        LightGBMController().fit(features, losses, ControllerConformance.budgets)
    monkeypatch.setattr("controller.models.gbdt.MOST_TREES", 5)
    with pytest.raises(LearningError, match=r"at most 5 trees .* train with fewer trees \(n_trees\)"):
        LightGBMController().fit(features, losses, ControllerConformance.budgets)


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
    features, losses = suite.data(400)
    controller = CONTROLLERS[name]()
    controller.fit(features, losses, suite.budgets)
    fresh, truth = suite.data(400, seed=1)
    assert np.abs(controller.predict(fresh) - truth).mean() < 0.13
    shuffled = CONTROLLERS[name]()
    shuffled.fit(np.random.default_rng(0).permutation(features), losses, suite.budgets)
    assert np.abs(shuffled.predict(fresh) - truth).mean() > 0.2


@pytest.mark.parametrize("name", LEARNED)
def test_one_class_only_is_learned_too(name) -> None:
    suite = ControllerConformance()
    features, losses = suite.data()
    controller = CONTROLLERS[name]()
    controller.fit(features, np.zeros_like(losses), suite.budgets)
    assert (controller.predict(features) < 0.1).all()


@pytest.mark.parametrize("name", LEARNED)
def test_constant_features_give_the_mean(name) -> None:
    suite = ControllerConformance()
    features, losses = suite.data(400)
    controller = CONTROLLERS[name]()
    controller.fit(np.ones_like(features), losses, suite.budgets)
    np.testing.assert_allclose(controller.predict(np.ones_like(features))[0], losses.mean(0), atol=0.06)


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


def test_losses_outside_their_range_are_refused() -> None:
    features, losses = ControllerConformance().data()
    with pytest.raises(LearningError, match=r"a loss is .*; losses must lie in \[-1, 1\]"):
        LogisticController().fit(features, losses * 2, ControllerConformance.budgets)


def test_lightgbm_never_expects_less_of_a_larger_budget() -> None:
    suite = TestLightGBM()
    controller, features = suite.fitted()
    assert (np.diff(controller.predict(features), axis=1) <= 0).all()


def test_regret_is_least_for_the_true_losses() -> None:
    generator = torch.Generator().manual_seed(0)
    losses = torch.cat([torch.rand(500, 2, generator=generator), torch.zeros(500, 1)], dim=1)
    budgets = torch.tensor([0.5, 0.75, 1.0])
    torch.manual_seed(0)
    right = soft_regret(losses[:, :-1], losses, budgets)
    wrong = [
        soft_regret(other, losses, budgets) for other in (torch.ones(500, 2), torch.zeros(500, 2), losses[:, [1, 0]])
    ]
    assert all(right < other for other in wrong)


def test_choose_weighs_loss_against_budget() -> None:
    losses = np.array([[0.1, 0.05, 0], [0.9, 0.2, 0], [0.8, 0.7, 0], [np.nan, 0.1, 0], [0, 0.5, 0]])
    rule = ChoiceRule(np.array([0.5, 0.75, 1.0]), "score_lost")
    np.testing.assert_array_equal(rule.choose(losses, 0.0), [0, 0, 0, 2, 0])
    np.testing.assert_array_equal(rule.choose(losses, 1.0), [0, 1, 2, 2, 0])
    np.testing.assert_array_equal(rule.choose(losses, 5.5), [2, 2, 2, 2, 0])
    np.testing.assert_array_equal(rule.choose(losses, 5.1), [2, 2, 2, 2, 0])
    np.testing.assert_array_equal(rule.choose(losses, 4.9), [0, 2, 2, 2, 0])
    np.testing.assert_array_equal(rule.choose(losses, float("inf")), [2, 2, 2, 2, 0])
    np.testing.assert_array_equal(rule.choose(losses, None), [2, 2, 2, 2, 2])
    np.testing.assert_array_equal(replace(rule, plan=1).choose(losses, 1.0), [1, 1, 1, 1, 1])


def test_choose_takes_plans_that_win() -> None:
    """What a plan wins pays for its budget."""
    losses = np.array([[-0.2, -0.1, 0], [0.1, -0.4, 0], [0.1, 0.02, 0], [-np.inf, -0.8, 0]], dtype=np.float32)
    rule = ChoiceRule(np.array([0.5, 0.75, 1.0]), "mean_score")
    np.testing.assert_array_equal(rule.choose(losses, 0.1), [0, 0, 0, 2])
    np.testing.assert_array_equal(rule.choose(losses, 4.0), [0, 1, 1, 2])
    np.testing.assert_array_equal(rule.choose(losses, 100.0), [0, 1, 2, 2])


def test_choose_follows_expected_wins_more_at_lower_prices() -> None:
    """What is expected to be won is noise here; still each price lets more prompts leave the full plan."""
    losses = np.random.default_rng(0).normal(0, 0.04, (200, 3)).astype(np.float32)
    losses[:, -1] = 0
    rule = ChoiceRule(np.array([0.5, 0.75, 1.0]), "mean_score")
    left = [(rule.choose(losses, price) < 2).mean() for price in (1000.0, 100.0, 30.0, 10.0, 1.0)]
    assert left[0] == 0
    assert left[-1] == 1
    assert left == sorted(left)
    assert 0 < left[2] < left[3], "by and by"


def test_the_full_plan_loses_nothing() -> None:
    features, losses = ControllerConformance().data()
    with pytest.raises(LearningError, match=r"the last plan has a loss of .*; it is the full plan, with loss 0"):
        LogisticController().fit(features, losses[:, ::-1], ControllerConformance.budgets)


@pytest.mark.parametrize("name", LEARNED)
@pytest.mark.parametrize("least", [-1.0, 0.0])
def test_the_range_of_losses_is_that_of_the_prompts(name, least, tmp_path) -> None:
    features, losses = ControllerConformance().data()
    losses[:, :-1] = least + (1 - least) * losses[:, :-1]
    controller = CONTROLLERS[name]()
    controller.fit(features, losses, ControllerConformance.budgets)
    assert controller.predict(features).min() >= least
    controller.save(tmp_path)
    assert CONTROLLERS[name].load(tmp_path).loss_range == LossRange(least)


class OfQuality(LogisticController):
    """Of the contract before, in which the full plan kept all."""

    def _predict(self, features):
        return 1 - super()._predict(features)


def test_a_controller_of_the_old_contract_is_told() -> None:
    features, losses = ControllerConformance().data()
    old = OfQuality()
    old.fit(features, losses, ControllerConformance.budgets)
    with pytest.raises(LearningError, match="OfQuality predicts 1 for the full plan, whose loss is 0; `_predict` must"):
        old.predict(features)


def test_every_registered_name_resolves() -> None:
    assert {CONTROLLERS[name].__name__ for name in CONTROLLERS} == {
        "LightGBMController",
        "LogisticController",
        "MLPController",
    }
