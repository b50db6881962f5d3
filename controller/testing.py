"""Conformance suite of controllers, for a test class to inherit.

    class TestMine(ControllerConformance):
        def make(self):
            return MyController()

pytest then finds the tests below in `TestMine`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from controller.base import ChoiceRule, Controller, Floats, LearningError


class ControllerConformance:
    """Tests that every controller must pass; a subclass overrides `make`."""

    budgets: Floats = np.array([0.5, 0.75, 1.0], dtype=np.float32)

    def make(self) -> Controller:
        """A new controller, not yet fitted."""
        raise NotImplementedError

    def data(self, n: int = 120, seed: int = 0) -> tuple[Floats, Floats]:
        """Features [n, 6] and losses [n, 3], which follow from the first feature alone."""
        random = np.random.default_rng(seed)
        features = random.normal(size=(n, 6)).astype(np.float32)
        losses = np.clip(np.array([1.5, -0.5, -99.0]) - features[:, :1] * 2, 0, 1)
        return features, losses.astype(np.float32)

    def fitted(self) -> tuple[Controller, Floats]:
        features, losses = self.data()
        controller = self.make()
        controller.fit(features, losses, self.budgets)
        return controller, features

    @pytest.mark.parametrize("least", [0.0, -1.0])
    def test_predictions_are_losses(self, least: float) -> None:
        features, losses = self.data()
        losses[:, :-1] = least + (1 - least) * losses[:, :-1]
        controller = self.make()
        controller.fit(features, losses, self.budgets)
        predicted = controller.predict(features)
        assert predicted.shape == losses.shape
        assert (np.abs(predicted) <= 1).all()
        assert (predicted[:, -1] == 0).all()
        np.testing.assert_allclose(predicted.mean(0), losses.mean(0), atol=0.2 * (1 - least))

    def test_fitting_twice_gives_the_same_predictions(self) -> None:
        (first, features), (second, _) = self.fitted(), self.fitted()
        np.testing.assert_array_equal(first.predict(features), second.predict(features))

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
        assert (ChoiceRule(self.budgets, "mean_score").choose(predicted, 0.01)[[3, 7]] == len(self.budgets) - 1).all()

    def test_features_that_are_not_finite_are_not_learned_from(self) -> None:
        features, losses = self.data()
        features[5, 2] = np.nan
        with pytest.raises(LearningError, match="1 of 120 prompts have features that are not finite"):
            self.make().fit(features, losses, self.budgets)

    def test_inputs_are_left_alone(self) -> None:
        features, losses = self.data()
        before = features.copy(), losses.copy()
        controller = self.make()
        controller.fit(features, losses, self.budgets)
        controller.predict(features)
        np.testing.assert_array_equal(features, before[0])
        np.testing.assert_array_equal(losses, before[1])
