"""What a plan promises beside exactness (for that see test_families.py): threads, nesting, caches, compiled steps."""

import copy
import pickle
import threading

import pytest
import torch
from tiny import N_LAYERS, OPTIONS, padded_batch, tiny_model
from torch._dynamo.utils import counters
from transformers import CompileConfig

from backbone.errors import PlanError, UnsupportedModelError
from backbone.execution.apply_plan import apply_plan, apply_plans
from backbone.execution.prompt_prefix import probe_states
from backbone.families import decoder_layers
from backbone.plan import LayerPlan
from backbone.testing import patches

PLANS = {
    "middle": LayerPlan.skipping(N_LAYERS, {2, 4}),
    "first layer": LayerPlan.skipping(N_LAYERS, {0}),
    "early exit": LayerPlan.exiting(N_LAYERS, 3),
    "attention": LayerPlan.skipping(N_LAYERS, attention={0, 3}),
}
GREEDY = {"max_new_tokens": 8, "do_sample": False}


@pytest.fixture(scope="module", params=sorted(OPTIONS))
def any_model(request):
    return tiny_model(request.param)


@pytest.mark.parametrize(
    ("plan", "changed"),
    [
        (LayerPlan.full(N_LAYERS), ["model"]),
        (LayerPlan.skipping(N_LAYERS, {2}), ["model", "model.layers.2"]),
        (LayerPlan.skipping(N_LAYERS, attention={1}), ["model", "model.layers.1.self_attn"]),
    ],
    ids=str,
)
def test_a_uniform_plan_changes_only_what_it_skips(model, plan, changed) -> None:
    for block in (apply_plan(model, plan), apply_plans(model, [plan] * 4)):
        with block:
            assert {name for name, kind in patches(model) if kind == "forward"} == {*changed}


def test_nested_plans_are_refused(model) -> None:
    with (
        apply_plan(model, PLANS["middle"]),
        pytest.raises(PlanError, match="already runs plan 0-1,3,5"),
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
        cache = model(**batch).cache
    step = {"input_ids": batch["input_ids"][:, :1]}
    with (
        apply_plan(model, LayerPlan.full(N_LAYERS)),
        pytest.raises(PlanError, match="layer 2 holds no rows, wanted are all"),
    ):
        model(**step, cache=cache)
    with apply_plan(model, PLANS["early exit"]), pytest.raises(PlanError, match=r"layer \d holds (no|all) rows"):
        model(**step, cache=cache)


def test_a_cache_of_a_plan_says_what_it_is_to_a_model_without_one(any_model) -> None:
    ids = padded_batch()["input_ids"][:1]
    for plan in PLANS.values():
        with torch.no_grad(), apply_plan(any_model, plan):
            cache = any_model(input_ids=ids).cache
        sentence = rf"was filled under plan {plan}, which skips layer {min(plan.skipped_attention)}, and now"
        with torch.no_grad(), pytest.raises(PlanError, match=sentence):
            any_model(input_ids=ids[:, :1], cache=copy.deepcopy(cache))
        with pytest.raises(PlanError, match=sentence):
            any_model.generate(input_ids=torch.cat([ids, ids], 1), cache=pickle.loads(pickle.dumps(cache)), **GREEDY)


def test_a_plan_of_another_model_is_refused(model) -> None:
    with pytest.raises(PlanError, match="is for 7 layers, this model has 6"), apply_plan(model, LayerPlan.full(7)):
        pass


def test_probe_gives_the_states_after_its_last_layer(any_model) -> None:
    batch = padded_batch()
    states = probe_states(any_model, batch["input_ids"], batch["attention_mask"], 2)[-1]
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


def compiled() -> dict[str, object]:
    """Arguments with which `generate()` compiles its decoding step, here without a code generator, to save time."""
    config = CompileConfig(mode=None, backend="eager")
    config._compile_all_devices = True
    return {**GREEDY, "cache_implementation": "static", "compile_config": config}


@torch._dynamo.config.patch(recompile_limit=2)
def test_each_plan_is_compiled_once_whatever_comes_between() -> None:
    model, batch = tiny_model("llama"), padded_batch()
    plans = [LayerPlan.skipping(N_LAYERS, {i}) for i in range(2, 5)]  # one more than dynamo keeps
    stock = model.generate(**batch, **GREEDY)
    assert torch.equal(model.generate(**batch, **compiled()), stock)
    graphs = []
    for plan in [*plans, *plans]:
        with apply_plan(model, plan):
            before = counters["stats"]["unique_graphs"]
            found = model.generate(**batch, **compiled())
            graphs.append(counters["stats"]["unique_graphs"] - before)
            assert torch.equal(found, model.generate(**batch, **GREEDY))
    assert min(graphs[: len(plans)]) > 0, "the decoding step was not compiled"
    assert graphs[len(plans) :] == [0] * len(plans)
    assert torch.equal(model.generate(**batch, **compiled()), stock)


@pytest.mark.parametrize("part", ["model.layers.3", ""])
def test_a_model_compiled_by_hand_is_refused(part) -> None:
    model = tiny_model("llama")
    module = model.get_submodule(part)
    if part:
        module.compile(backend="eager")
    else:
        module.forward = torch.compile(module.forward, backend="eager")
    said = f"{type(module).__name__} was compiled by the user"
    with pytest.raises(UnsupportedModelError, match=said), apply_plan(model, PLANS["middle"]):
        pass


def test_forwards_that_others_had_set_come_back(model) -> None:
    layer = decoder_layers(model)[2]
    own = layer.forward
    layer.forward = own
    try:
        with apply_plan(model, PLANS["middle"]):
            assert layer.__dict__["forward"] != own
        assert layer.__dict__["forward"] == own
    finally:
        del layer.forward
