"""Every declared family, and some that are only probed, pass the conformance suite; others are refused by name."""

from copy import deepcopy

import pytest
import torch
from tiny import OPTIONS, UNDECLARED, tiny_model

from backbone.errors import UnsupportedModelError
from backbone.execution import executor
from backbone.execution.apply_plan import apply_plan
from backbone.execution.self_test import check_exactness, rounding_limit
from backbone.families import decoder_layers, family_of, sublayer_bytes
from backbone.model_source import FAMILIES
from backbone.plan import LayerPlan
from backbone.testing import FamilyConformance


def suite_of(family: str) -> type[FamilyConformance]:
    return type(f"Test_{family}", (FamilyConformance,), {"make": lambda self: tiny_model(family)})


for name in (*OPTIONS, *UNDECLARED):
    globals()[f"Test_{name}"] = suite_of(name)


def test_every_declared_family_is_tested() -> None:
    assert set(OPTIONS) == set(FAMILIES)
    assert not set(UNDECLARED) & set(FAMILIES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", sorted(OPTIONS))
def test_the_self_test_sees_a_cache_that_was_not_fitted(family, dtype, monkeypatch) -> None:
    monkeypatch.setattr(executor, "hold_rows", lambda *_: None)
    with pytest.raises(UnsupportedModelError, match="a step with a cache differs by"):
        check_exactness(tiny_model(family).to(dtype))


@pytest.mark.parametrize("family", sorted(OPTIONS))
def test_bytes_of_sublayers_add_up_to_the_layers(family) -> None:
    model = tiny_model(family)
    layers = sum(p.numel() * p.element_size() for layer in decoder_layers(model) for p in layer.parameters())
    assert sum(attention + mlp for attention, mlp in sublayer_bytes(model)) == layers
    assert all(attention > 0 and mlp > 0 for attention, mlp in sublayer_bytes(model))


def test_of_an_undeclared_family_only_whole_layers_can_be_skipped() -> None:
    model = tiny_model("gptj")
    with (
        pytest.raises(UnsupportedModelError, match=r"runs half of layer 2, but gptj is not a declared family"),
        apply_plan(model, LayerPlan.skipping(6, attention={2})),
    ):
        pass


def test_a_model_that_fails_its_self_test_is_refused_before_its_first_plan(monkeypatch) -> None:
    model = tiny_model("gptj")
    monkeypatch.setattr(executor, "hold_rows", lambda *_: None)
    for _ in range(2):
        with pytest.raises(UnsupportedModelError, match="gptj"), apply_plan(model, LayerPlan.full(6)):
            pass


@pytest.mark.parametrize(
    ("device", "allowed", "limit"), [("cuda", True, 0.1), ("cuda", False, 1e-3), ("cpu", True, 1e-3)]
)
def test_products_in_tf32_may_be_rounded_as_half_precision_is(device, allowed, limit) -> None:
    """Seen on an H200: 0.2% between a step with a cache and one without, where TF32 was allowed."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed  # monkeypatch cannot put this attribute back
    try:
        assert rounding_limit(torch.float32, torch.device(device)) == limit
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def test_the_self_test_leaves_the_training_mode_alone() -> None:
    model = tiny_model("llama", attention_dropout=0.5).train()
    decoder_layers(model)[1].eval()
    check_exactness(model)
    assert model.training
    assert not decoder_layers(model)[1].training


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"is_encoder_decoder": True}, "encoder-decoder"),
        ({"vision_config": {}}, "multimodal"),
        ({"num_kv_shared_layers": 2}, "shares keys and values"),
    ],
)
def test_models_that_cannot_skip_exactly_are_refused_by_name(changes, message) -> None:
    odd = deepcopy(tiny_model("llama"))  # a model's family is found once
    for name, value in changes.items():
        setattr(odd.config, name, value)
    with pytest.raises(UnsupportedModelError, match=message):
        family_of(odd)


def test_a_model_without_one_list_of_layers_is_refused() -> None:
    odd = deepcopy(tiny_model("llama"))
    odd.config.model_type, odd.config.num_hidden_layers = "mystery", 7
    with pytest.raises(UnsupportedModelError, match="unknown model family 'mystery': it has 0 lists of 7 modules"):
        family_of(odd)
