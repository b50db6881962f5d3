"""The conformance suite of controllers: a test class that inherits it proves that its controller keeps the contract.

    class TestMine(ControllerConformance):
        def make(self):
            return MyController()

pytest then finds the tests below in `TestMine`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from controller.base import Bools, Controller, Floats


class ControllerConformance:
    """Inherit, and override `make`; pytest finds the tests."""

    budgets: Floats = np.array([0.5, 0.75, 1.0], dtype=np.float32)

    def make(self) -> Controller:
        """A new controller that was not fitted."""
        raise NotImplementedError

    def data(self, n: int = 120, seed: int = 0) -> tuple[Floats, Bools]:
        """Features [n, 6] and sufficiency [n, 3]: the first feature decides which plans are sufficient."""
        random = np.random.default_rng(seed)
        features = random.normal(size=(n, 6)).astype(np.float32)
        sufficient = np.column_stack([features[:, 0] > 0.5, features[:, 0] > -0.5, np.ones(n, dtype=bool)])
        return features, sufficient

    def fitted(self) -> tuple[Controller, Floats]:
        features, sufficient = self.data()
        controller = self.make()
        controller.fit(features, sufficient, self.budgets)
        return controller, features

    def test_probabilities_have_the_right_shape_and_range(self) -> None:
        controller, features = self.fitted()
        probabilities = controller.predict(features)
        assert probabilities.shape == (len(features), len(self.budgets))
        assert np.isfinite(probabilities).all()
        assert (probabilities >= 0).all()
        assert (probabilities <= 1).all()
        assert (probabilities[:, -1] == 1).all()

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
        assert all(path.name.startswith("controller.") for path in tmp_path.iterdir())

    def test_inputs_are_left_alone(self) -> None:
        features, sufficient = self.data()
        before = features.copy(), sufficient.copy()
        controller = self.make()
        controller.fit(features, sufficient, self.budgets)
        controller.predict(features)
        np.testing.assert_array_equal(features, before[0])
        np.testing.assert_array_equal(sufficient, before[1])
