import numpy as np
import pytest
import torch
from tiny import padded_batch

from backbone.execution.prompt_prefix import probe_states
from controller.base import LearningError, check_sets
from controller.features import SETS, Projection, extract, prompt_features

EVERY = tuple(SETS)


def by_hand(states: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor, *sets: str) -> dict[str, np.ndarray]:
    return extract(None, [states * 0.5, states], ids, mask, sets)


def test_pooling_ignores_padding() -> None:
    states, ids = torch.arange(24.0).reshape(1, 4, 6) + 1, torch.tensor([[9, 9, 3, 5]])
    narrow = [name for name in EVERY if name != "lens"]
    whole = by_hand(states[:, 2:], ids[:, 2:], torch.ones(1, 2), *narrow)
    padded = by_hand(states, ids, torch.tensor([[0, 0, 1, 1]]), *narrow)
    for name in narrow:
        np.testing.assert_allclose(whole[name], padded[name], rtol=1e-5, err_msg=name)


def test_sets_are_what_they_say() -> None:
    states, ids = torch.tensor([[[3.0, 4.0], [0.0, 2.0]]]), torch.tensor([[7, 7]])
    found = by_hand(states, ids, torch.ones(1, 2), "length", "tokens", "embedding", "states", "path")
    np.testing.assert_allclose(found["length"], [[np.log(2)]])
    np.testing.assert_allclose(found["tokens"], [[0.5, 0.5, np.log(8), 0]], atol=1e-6)
    np.testing.assert_allclose(found["embedding"], [[0.75, 1.5]])
    np.testing.assert_allclose(found["states"], [[1.5, 3, 0, 2]])
    cosine = 3 / np.hypot(1.5, 3)
    np.testing.assert_allclose(found["path"], [[np.log(3), np.log(4.5), 1, 1, 1.5 / 3.5, cosine]], rtol=1e-5)


def test_different_tokens_are_counted_without_the_padding() -> None:
    ids, mask = torch.tensor([[0, 4, 5, 4], [4, 4, 0, 0]]), torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    shares = by_hand(torch.ones(2, 4, 3), ids, mask, "tokens")["tokens"][:, 0]
    np.testing.assert_allclose(shares, [2 / 3, 2 / 4])


def test_the_lens_reads_what_an_early_exit_would_say(model) -> None:
    ids = padded_batch()["input_ids"][:1]
    mask = torch.ones_like(ids)
    states = probe_states(model, ids, mask, model.config.num_hidden_layers)
    entropy, top = extract(model, states, ids, mask, ["lens"])["lens"][0]
    with torch.inference_mode():
        said = model(input_ids=ids, attention_mask=mask).logits[0, -1].float().softmax(-1)
    assert top == pytest.approx(float(said.max()), rel=1e-3)
    assert entropy == pytest.approx(float(-(said * said.log()).sum()), rel=1e-3)


def test_features_do_not_depend_on_the_batch(model) -> None:
    batch = padded_batch()
    together = prompt_features(model, batch["input_ids"], batch["attention_mask"], 2, EVERY)
    for row, padding in enumerate((0, 2, 4, 7)):
        ids = batch["input_ids"][row : row + 1, padding:]
        alone = prompt_features(model, ids, torch.ones_like(ids), 2, EVERY)
        for name in EVERY:
            np.testing.assert_allclose(alone[name][0], together[name][row], rtol=1e-3, atol=1e-4, err_msg=name)


def test_an_unknown_set_is_named() -> None:
    with pytest.raises(LearningError, match="unknown features 'moods'; known are length"):
        check_sets(["length", "moods"])


def some_features(n: int = 50) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    sets = {"length": 1, "states": 20, "path": 4}
    features = {name: (random.normal(size=(n, width)) * 3 + 1).astype(np.float32) for name, width in sets.items()}
    features["states"][:, 4] = 7.0
    return features


def test_projection_standardises_and_survives_a_file(tmp_path) -> None:
    features = some_features()
    projection = Projection.fit(features, ["length", "states", "path"], 8)
    projected = projection(features)
    assert projected.shape == (50, 8 + 5)
    np.testing.assert_allclose(projected.std(0, ddof=1), 1, atol=0.02)
    projection.save(tmp_path / "projection.safetensors")
    loaded = Projection.load(tmp_path / "projection.safetensors")
    assert loaded.sets == ("states", "length", "path")
    np.testing.assert_array_equal(loaded(features), projected)
    few = {name: values[:5] for name, values in features.items()}
    assert Projection.fit(few, ["states", "length"], 8)(features).shape == (50, 4 + 1)


def test_a_projection_reads_its_own_sets_only() -> None:
    features = some_features()
    projected = Projection.fit(features, ["length"], 8)(features)
    np.testing.assert_allclose(
        projected[:, 0], (features["length"][:, 0] - features["length"].mean()) / features["length"].std(), rtol=1e-4
    )


def test_rounding_in_features_that_hardly_vary_stays_small() -> None:
    random = np.random.default_rng(0)
    states = (random.normal(size=(30, 2)) @ random.normal(size=(2, 12))).astype(np.float32)  # two directions, no more
    projection = Projection.fit({"states": states}, ["states"], 8)
    rounded = states + random.normal(size=states.shape).astype(np.float32) * 1e-6
    found, again = projection({"states": states}), projection({"states": rounded})
    np.testing.assert_allclose(found[:, :2].std(0, ddof=1), 1, rtol=1e-3)
    np.testing.assert_allclose(again, found, atol=1e-3)


def test_constant_or_infinite_features_are_refused() -> None:
    features = some_features()
    with pytest.raises(LearningError, match=r"all 50 prompts have the same features \(length\)"):
        Projection.fit({"length": np.ones((50, 1), np.float32)}, ["length"], 8)
    features["path"][3] = np.inf
    with pytest.raises(LearningError, match="1 of 50 prompts have features that are not finite"):
        Projection.fit(features, ["path"], 8)
