"""Plans are exact: with a cache as without, on every family, and nothing stays behind."""

import threading

import pytest
import torch
from tiny import N_LAYERS, OPTIONS, padded_batch, tiny_model
from transformers import DynamicCache

from backbone.cache import CacheMismatchError
from backbone.families import UnsupportedModelError, decoder_layers, family_of, sublayer_bytes
from backbone.plan import LayerPlan, PlanError
from backbone.probing import probe
from backbone.running import NestedPlanError, apply_plan

PLANS = {
    "middle": LayerPlan.skipping(N_LAYERS, {2, 4}),
    "first layer": LayerPlan.skipping(N_LAYERS, {0}),
    "first full-attention layer": LayerPlan.skipping(N_LAYERS, {2}),
    "all full-attention layers": LayerPlan.skipping(N_LAYERS, {2, 5}),
    "early exit": LayerPlan.exiting(N_LAYERS, 3),
    "most": LayerPlan.skipping(N_LAYERS, {0, 1, 2, 5}),
    "attention": LayerPlan.skipping(N_LAYERS, attention={0, 3}),
    "sub-layers": LayerPlan.skipping(N_LAYERS, {5}, attention={1}, mlp={3}),
}
GREEDY = {"max_new_tokens": 8, "do_sample": False}


@pytest.fixture(scope="module", params=sorted(OPTIONS))
def any_model(request):
    return tiny_model(request.param)


@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static"}], ids=["dynamic", "static"])
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())
def test_cached_tokens_equal_the_uncached_computation(any_model, plan, cache) -> None:
    if plan.skipped_mlp - plan.skipped_layers and family_of(any_model).mlp is None:
        with pytest.raises(UnsupportedModelError, match="cannot be skipped by themselves"), apply_plan(any_model, plan):
            pass
        return
    batch = padded_batch()
    with apply_plan(any_model, plan):
        expected = any_model.generate(**batch, **GREEDY, use_cache=False)
        assert torch.equal(any_model.generate(**batch, **GREEDY, **cache), expected)
        alone = any_model.generate(input_ids=batch["input_ids"][:1], **GREEDY, **cache)
    assert alone[0].tolist() == expected[0, : alone.shape[1]].tolist()
    assert not torch.equal(any_model.generate(**batch, **GREEDY), expected), "the plan changed nothing"


def test_full_plan_is_bit_equal_to_the_stock_model(any_model) -> None:
    batch = padded_batch()
    stock = any_model(**batch).logits
    with apply_plan(any_model, LayerPlan.full(N_LAYERS)):
        assert torch.equal(any_model(**batch).logits, stock)
    assert torch.equal(any_model(**batch).logits, stock)


def test_skipped_layers_are_not_computed_and_keep_no_cache(model) -> None:
    calls = []
    hooks = [
        layer.self_attn.register_forward_hook(lambda *_, i=i: calls.append(i))
        for i, layer in enumerate(decoder_layers(model))
    ]
    cache = DynamicCache(config=model.config)
    with apply_plan(model, LayerPlan.skipping(N_LAYERS, {0, 3})):
        model(**padded_batch(), past_key_values=cache)
    for hook in hooks:
        hook.remove()
    assert calls == [1, 2, 4, 5]
    assert [i for i, layer in enumerate(cache.layers) if layer.keys is not None] == [1, 2, 4, 5]
    assert cache.get_seq_length() == 11


def test_everything_is_restored_after_an_exception(model) -> None:
    batch = padded_batch()
    stock = model(**batch).logits
    with pytest.raises(ZeroDivisionError), apply_plan(model, PLANS["sub-layers"]):
        raise ZeroDivisionError
    assert torch.equal(model(**batch).logits, stock)
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_nested_plans_are_refused(model) -> None:
    with (
        apply_plan(model, PLANS["middle"]),
        pytest.raises(NestedPlanError, match="already runs plan 0-1,3,5"),
        apply_plan(model, PLANS["early exit"]),
    ):
        pass


def test_threads_with_different_plans_do_not_mix(model) -> None:
    batch, plans = padded_batch(), [PLANS["middle"], PLANS["early exit"], PLANS["first layer"], PLANS["attention"]]
    expected, found = {}, {}
    for plan in plans:
        with apply_plan(model, plan):
            expected[plan] = model.generate(**batch, **GREEDY)

    def work(plan: LayerPlan) -> None:
        for _ in range(3):
            with apply_plan(model, plan):
                found[plan] = model.generate(**batch, **GREEDY)

    threads = [threading.Thread(target=work, args=(plan,)) for plan in plans]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[plan], expected[plan]) for plan in plans)


def test_a_cache_of_another_plan_is_refused(model) -> None:
    batch = padded_batch()
    with apply_plan(model, PLANS["middle"]):
        cache = model(**batch).past_key_values
    step = {"input_ids": batch["input_ids"][:, :1]}
    with apply_plan(model, LayerPlan.full(N_LAYERS)), pytest.raises(CacheMismatchError, match="filled without layer 2"):
        model(**step, past_key_values=cache)
    with (
        apply_plan(model, PLANS["early exit"]),
        pytest.raises(CacheMismatchError, match=r"without layer 2|holds layer"),
    ):
        model(**step, past_key_values=cache)


def test_a_conversation_goes_on_in_the_cache_of_its_plan(model) -> None:
    ids = padded_batch()["input_ids"][:1]
    with apply_plan(model, PLANS["first layer"]):
        whole = model(input_ids=ids, use_cache=False).logits[:, -1]
        cache = model(input_ids=ids[:, :6]).past_key_values
        continued = model(input_ids=ids[:, 6:], past_key_values=cache).logits[:, -1]
    torch.testing.assert_close(continued, whole)


def test_beams_and_sampling_work_under_a_plan(model) -> None:
    batch = padded_batch()
    with apply_plan(model, PLANS["first layer"]):
        beams = model.generate(**batch, **GREEDY, num_beams=2)
        assert torch.equal(beams, model.generate(**batch, **GREEDY, num_beams=2, use_cache=False))
        torch.manual_seed(0)
        sampled = model.generate(**batch, max_new_tokens=8, do_sample=True)
        torch.manual_seed(0)
        assert torch.equal(sampled, model.generate(**batch, max_new_tokens=8, do_sample=True, use_cache=False))


def test_a_plan_of_another_model_is_refused(model) -> None:
    with pytest.raises(PlanError, match="is for 7 layers, this model has 6"), apply_plan(model, LayerPlan.full(7)):
        pass


def test_probe_gives_the_states_after_its_last_layer(any_model) -> None:
    batch = padded_batch()
    states = probe(any_model, batch["input_ids"], batch["attention_mask"], 2)
    captured = []
    hook = decoder_layers(any_model)[1].register_forward_hook(lambda m, a, output: captured.append(output))
    with torch.inference_mode():
        any_model(**batch, **_positions(any_model, batch))
    hook.remove()
    full = captured[0][0] if isinstance(captured[0], tuple) else captured[0]
    mask = batch["attention_mask"].bool()
    torch.testing.assert_close(states[mask], full[mask])


def _positions(model, batch):
    positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    return {} if model.config.model_type in ("bloom",) else {"position_ids": positions}


def test_bytes_of_sublayers_add_up_to_the_layers(any_model) -> None:
    sizes = sublayer_bytes(any_model)
    layers = sum(p.numel() * p.element_size() for layer in decoder_layers(any_model) for p in layer.parameters())
    assert sum(attention + mlp for attention, mlp in sizes) == layers
    assert all(attention > 0 and mlp > 0 for attention, mlp in sizes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"is_encoder_decoder": True}, "encoder-decoder"),
        ({"vision_config": {}}, "multimodal"),
        ({"num_kv_shared_layers": 2}, "shares keys and values"),
        ({"model_type": "mystery"}, "unknown model family 'mystery'; known are bloom"),
    ],
)
def test_models_that_cannot_skip_exactly_are_refused_by_name(changes, message) -> None:
    odd = tiny_model("llama")
    for name, value in changes.items():
        setattr(odd.config, name, value)
    with pytest.raises(UnsupportedModelError, match=message):
        family_of(odd)
