import numpy as np
import torch
from tiny import padded_batch

from controller.features import SCALARS, Projection, pool, prompt_features


def test_pooling_ignores_padding() -> None:
    states = torch.arange(24.0).reshape(1, 4, 6)
    whole = pool(states[:, 2:], torch.ones(1, 2))
    padded = pool(states, torch.tensor([[0, 0, 1, 1]]))
    np.testing.assert_allclose(whole, padded)
    np.testing.assert_allclose(whole[0, :6], states[0, 2:].mean(0))
    np.testing.assert_allclose(whole[0, 6:12], states[0, -1])
    assert whole[0, 12 + SCALARS.index("log_tokens")] == np.log(np.float32(2))


def test_features_do_not_depend_on_the_batch(model) -> None:
    batch = padded_batch()
    together = prompt_features(model, batch["input_ids"], batch["attention_mask"], 2)
    for row, padding in enumerate((0, 2, 4, 7)):
        ids = batch["input_ids"][row : row + 1, padding:]
        np.testing.assert_allclose(
            prompt_features(model, ids, torch.ones_like(ids), 2)[0], together[row], rtol=1e-4, atol=1e-5
        )


def test_projection_standardises_and_survives_a_file(tmp_path) -> None:
    random = np.random.default_rng(0)
    features = (random.normal(size=(50, 25)) * 3 + 1).astype(np.float32)
    features[:, 4] = 7.0
    projection = Projection.fit(features, 8)
    projected = projection(features)
    assert projected.shape == (50, 8 + len(SCALARS))
    np.testing.assert_allclose(projected.std(0, ddof=1), 1, atol=0.02)
    projection.save(tmp_path / "projection.safetensors")
    np.testing.assert_array_equal(Projection.load(tmp_path / "projection.safetensors")(features), projected)
    assert Projection.fit(features[:5], 8)(features).shape == (50, 4 + len(SCALARS))
