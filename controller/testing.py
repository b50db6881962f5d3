"""The conformance suite of controllers, to be inherited by a test class.

    class TestMine(ControllerConformance):
        def make(self):
            return MyController()

pytest then finds the tests below in `TestMine`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from controller.base import Controller, Floats, LearningError, choose


class ControllerConformance:
    """Inherit, and override `make`; pytest finds the tests."""

    budgets: Floats = np.array([0.5, 0.75, 1.0], dtype=np.float32)

    def make(self) -> Controller:
        """A new controller that was not fitted."""
        raise NotImplementedError

    def data(self, n: int = 120, seed: int = 0) -> tuple[Floats, Floats]:
        """Features [n, 6] and quality [n, 3]: the first feature decides the quality of a plan."""
        random = np.random.default_rng(seed)
        features = random.normal(size=(n, 6)).astype(np.float32)
        quality = np.clip(features[:, :1] * 2 + np.array([-0.5, 1.5, 99.0]), 0, 1)
        return features, quality.astype(np.float32)

    def fitted(self) -> tuple[Controller, Floats]:
        features, quality = self.data()
        controller = self.make()
        controller.fit(features, quality, self.budgets)
        return controller, features

    def test_predictions_have_the_right_shape_and_range(self) -> None:
        controller, features = self.fitted()
        predicted = controller.predict(features)
        assert predicted.shape == (len(features), len(self.budgets))
        assert np.isfinite(predicted).all()
        assert (predicted >= 0).all()
        assert (predicted <= 1).all()
        assert (predicted[:, -1] == 1).all()

    def test_a_plan_may_have_more_quality_than_the_full_one(self) -> None:
        features, quality = self.data()
        signed = np.column_stack([quality[:, :-1], np.full(len(quality), 0.5, dtype=np.float32)])
        controller = self.make()
        controller.fit(features, signed, self.budgets)
        predicted = controller.predict(features, full=0.5)
        assert np.isfinite(predicted).all()
        assert (predicted >= 0).all()
        assert (predicted <= 1).all()
        assert (predicted[:, -1] == 0.5).all()

    def test_fitting_twice_gives_the_same_predictions(self) -> None:
        (first, features), (second, _) = self.fitted(), self.fitted()
        np.testing.assert_array_equal(first.predict(features), second.predict(features))

    def test_predictions_do_not_depend_on_order(self) -> None:
        controller, features = self.fitted()
        order = np.random.default_rng(1).permutation(len(features))
        np.testing.assert_allclose(controller.predict(features)[order], controller.predict(features[order]), atol=1e-6)

    def test_predictions_do_not_depend_on_the_batch(self) -> None:
        controller, features = self.fitted()
        alone = np.concatenate([controller.predict(row[None]) for row in features])
        np.testing.assert_allclose(controller.predict(features), alone, atol=1e-6)

    def test_saving_and_loading_gives_the_same_bits(self, tmp_path: Path) -> None:
        controller, features = self.fitted()
        controller.save(tmp_path)
        loaded = type(controller).load(tmp_path)
        np.testing.assert_array_equal(controller.predict(features), loaded.predict(features))
        assert {path.name for path in tmp_path.iterdir()} == set(controller.FILES)
        assert all(name.startswith("controller.") for name in controller.FILES)

    def test_a_damaged_file_is_refused(self, tmp_path: Path) -> None:
        controller, _ = self.fitted()
        for number, name in enumerate(controller.FILES):
            for length in (0, 0.5, 0.99):
                folder = tmp_path / f"{number} {length}"
                folder.mkdir()
                controller.save(folder)
                content = (folder / name).read_bytes()
                (folder / name).write_bytes(content[: int(length * len(content))])
                with pytest.raises(LearningError, match=r"holds no|damaged"):
                    type(controller).load(folder)

    def test_rows_that_are_not_finite_get_the_full_plan(self) -> None:
        controller, features = self.fitted()
        broken = features.copy()
        broken[3, 1], broken[7, 0] = np.nan, np.inf
        predicted, sound = controller.predict(broken), np.delete(np.arange(len(features)), [3, 7])
        np.testing.assert_allclose(predicted[sound], controller.predict(features)[sound], atol=1e-6)
        assert (choose(predicted, self.budgets, 0.01)[[3, 7]] == len(self.budgets) - 1).all()

    def test_features_that_are_not_finite_are_not_learned_from(self) -> None:
        features, quality = self.data()
        features[5, 2] = np.nan
        with pytest.raises(LearningError, match="1 of 120 prompts have features that are not finite"):
            self.make().fit(features, quality, self.budgets)

    def test_inputs_are_left_alone(self) -> None:
        features, quality = self.data()
        before = features.copy(), quality.copy()
        controller = self.make()
        controller.fit(features, quality, self.budgets)
        controller.predict(features)
        np.testing.assert_array_equal(features, before[0])
        np.testing.assert_array_equal(quality, before[1])
