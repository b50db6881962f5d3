"""Whatever fails in the decision costs speed, never a request; nothing is left on the model."""

import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import N_LAYERS, VOCABULARY, padded_batch, tiny_model
from tiny_allocator import CHOSEN, DICT, FULL, GREEDY, PLANS, ByLength, alone, make_allocator, with_healing

from backbone.errors import InputError, PlanError, UnsupportedModelError, WrongModelError
from backbone.execution.apply_plan import apply_plan
from backbone.execution.prompt_prefix import run_prefix
from backbone.plan import LayerPlan
from backbone.testing import patches
from controller.features import extract
from runtime import plan_selection
from runtime.output import check_layers
from runtime.plan_selection import FullPlanWarning

ALL_FULL = [FULL] * 4


class Broken(ByLength):
    def _predict(self, features):
        raise ZeroDivisionError("a broken controller")


class Silent(ByLength):
    def _predict(self, features):
        losses = super()._predict(features)
        losses[3] = np.nan
        return losses


class Slow(ByLength):
    def __init__(self) -> None:
        self.may_go_on = threading.Event()

    def _predict(self, features):
        self.may_go_on.wait(30)
        return super()._predict(features)


def broken_probe(*args, **kwargs):
    raise RuntimeError("no memory for the probe")


def odd_states(*args):
    features = extract(*args)
    features["states"][2, 0] = np.nan
    return features


NOT_FINITE = "not finite in torch.float32; 1 prompts run the full plan; later"
FAILED = r"the controller failed \(ZeroDivisionError: a broken controller\); 4 prompts run the full plan"
FAILURES = {
    "probe": (ByLength, ("run_prefix", broken_probe), {}, "no memory for the probe", ALL_FULL),
    "states": (ByLength, ("extract", odd_states), {}, NOT_FINITE, [FULL, PLANS[1], FULL, PLANS[0]]),
    "controller": (Broken, None, {}, FAILED, ALL_FULL),
    "controller in time": (Broken, None, {"allocation_limit_ms": 60_000}, "a broken controller", ALL_FULL),
    "predictions": (Silent, None, {}, "the controller gave no number; 1 prompts run", [*CHOSEN[:3], FULL]),
    "time": (ByLength, None, {"allocation_limit_ms": 1e-6}, "the decision took longer than", ALL_FULL),
}
"""Controller, what is patched in the plan selection, options, the warning, and the plans that run."""


@pytest.mark.parametrize("failure", FAILURES)
def test_a_failed_decision_means_the_full_plan(model, monkeypatch, failure) -> None:
    controller, patch, options, sentence, plans = FAILURES[failure]
    allocator, batch = make_allocator(model, controller=controller()), padded_batch()
    if patch:
        monkeypatch.setattr(plan_selection, *patch)
    with pytest.warns(FullPlanWarning, match=sentence):
        output = allocator.generate(model, **batch, **GREEDY, **DICT, **options)
    assert output.plans == plans
    assert output.sequences[:, 11:].tolist() == alone(model, plans, batch, **GREEDY)


def test_a_probe_that_breaks_off_half_way_leaves_nothing_behind(model, allocator) -> None:
    before, calls = patches(model), []

    def interrupt(module, args):
        calls.append(module)
        if len(calls) == 1:
            raise RuntimeError("interrupted")

    hook = model.model.layers[1].mlp.register_forward_pre_hook(interrupt)
    with hook, pytest.warns(FullPlanWarning, match="interrupted"):
        output = allocator.generate(model, **padded_batch(), **GREEDY, **DICT)
    assert output.plans == ALL_FULL
    assert patches(model) == before


def at_the_edge_of_float16(tokens):
    """A model in float16 that adds something to the embeddings of these tokens, which are as large as float16 goes."""
    model = tiny_model("llama").half()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(2000)
        model.get_input_embeddings().weight[tokens] = torch.finfo(torch.float16).max
    return model


def test_states_that_a_dtype_cannot_hold_name_it() -> None:
    batch = padded_batch()
    token = min({*range(20, VOCABULARY)} - set(batch["input_ids"].flatten().tolist()))
    model = at_the_edge_of_float16([token])
    allocator = make_allocator(model, controller=ByLength())
    batch["input_ids"][2, -1] = token
    sentence = "not finite in torch.float16; 1 prompts run the full plan; load the model in bfloat16 or float32"
    with pytest.warns(FullPlanWarning, match=sentence):
        assert allocator.allocate(model, **batch) == [FULL, PLANS[1], FULL, PLANS[0]]
    assert allocator.allocate(model.bfloat16(), **batch) == CHOSEN


def test_a_model_whose_dtype_holds_no_state_at_all_is_refused() -> None:
    model = at_the_edge_of_float16(range(VOCABULARY))
    with pytest.raises(
        UnsupportedModelError, match=r"float16.* are not finite, .*load the model in bfloat16 or float32"
    ):
        make_allocator(model)
    with apply_plan(model.bfloat16(), FULL):
        pass


def test_a_controller_that_is_too_slow_is_not_waited_for(model) -> None:
    controller = Slow()
    allocator = make_allocator(model, controller=controller)
    start = time.monotonic()
    with pytest.warns(FullPlanWarning, match="the decision took longer than 200 ms"):
        output = allocator.generate(model, **padded_batch(), **GREEDY, **DICT, allocation_limit_ms=200)
    assert output.plans == ALL_FULL
    assert time.monotonic() - start < 25, "the controller was waited for"
    controller.may_go_on.set()
    output = allocator.generate(model, **padded_batch(), **GREEDY, **DICT, allocation_limit_ms=60_000)
    assert output.plans == CHOSEN


def test_a_failure_is_warned_of_once_and_by_each_reason(model) -> None:
    allocator, batch = make_allocator(model, controller=Broken()), padded_batch()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for copy in (allocator, allocator, replace(allocator, drift=None)):
            assert copy.generate(model, **batch, **GREEDY, **DICT).plans == ALL_FULL
        allocator.generate(model, **batch, **GREEDY, allocation_limit_ms=1e-6)
        make_allocator(model, controller=Broken()).allocate(model, **batch)
    assert [warning.category for warning in seen] == [FullPlanWarning] * 3


def test_layers_that_were_not_certified_are_found() -> None:
    check_layers((plan for plan in PLANS), iter(PLANS))
    check_layers([PLANS[0]] * 40, [PLANS[0]] * 39 + [FULL])
    with pytest.raises(InputError, match=r"ran 6.00 of 6 layers on average, where 4.50 were certified \(1.50"):
        check_layers(PLANS, [FULL, FULL])
    swapped = [LayerPlan.skipping(N_LAYERS, {2, 5})] * 4
    with pytest.raises(InputError, match=r"ran 4.00 of 6 layers on average, where 4.00 were certified \(4.00"):
        check_layers([PLANS[0]] * 4, swapped)


def test_a_wrong_model_is_still_an_error(model) -> None:
    with pytest.raises(WrongModelError, match="was made for"):
        make_allocator(model, controller=Broken()).generate(tiny_model("llama", seed=3), **padded_batch(), **GREEDY)


def test_healing_of_the_probe_layers_are_refused() -> None:
    model = tiny_model("llama")
    allocator = with_healing(model, changed="model.layers.1.mlp.down_proj.weight")
    with pytest.raises(WrongModelError, match=r"healing changes layer 1, .* first 2 layers"):
        allocator.generate(model, **padded_batch(), **GREEDY)


def test_inside_a_plan_no_allocator_can_work(model, allocator, caplog) -> None:
    with apply_plan(model, PLANS[0]), pytest.raises(PlanError):
        allocator.generate(model, **padded_batch(), **GREEDY)
    assert caplog.text == "", "what is the caller's fault is no failure of the probe"


class InterruptionError(Exception):
    pass


@pytest.mark.parametrize("call", range(1, 40, 3))
def test_an_exception_anywhere_leaves_the_model_as_it_was(call) -> None:
    """Some layer's attention raises at its n-th call, in the probe or in any lane, in a prefill or a step."""
    model, batch = tiny_model("llama"), padded_batch()
    allocator = make_allocator(model, controller=ByLength())
    stock = model.generate(**batch, **GREEDY)
    allocator.generate(model, **batch, **GREEDY)
    before, calls = patches(model), []

    def interrupt(module, args, kwargs):
        calls.append(module)
        if len(calls) == call:
            raise InterruptionError

    hooks = [layer.self_attn.register_forward_pre_hook(interrupt, with_kwargs=True) for layer in model.model.layers]
    try:
        allocator.generate(model, **batch, **GREEDY)
    except InterruptionError:
        assert call > 2, "the probe's failures cost no request"
    for hook in hooks:
        hook.remove()
    assert patches(model) == before
    assert torch.equal(model.generate(**batch, **GREEDY), stock)


def test_threads_on_one_model_get_what_they_get_alone() -> None:
    model = tiny_model("gemma3_text")
    allocator = make_allocator(model, controller=ByLength())
    batch = padded_batch()
    inputs = [{name: tensor[rows] for name, tensor in batch.items()} for rows in ([0, 3], [1, 2], [3, 2], [0, 1, 2])]
    expected = [allocator.generate(model, **one, **GREEDY) for one in inputs]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda one: allocator.generate(model, **one, **GREEDY), inputs * 3))
    assert all(map(torch.equal, found, expected * 3))


@pytest.mark.parametrize("family", ["gemma3_text", "qwen2", "falcon"])
def test_stock_generate_in_other_threads_stays_stock(family) -> None:
    """Bridges, changed weights, probes and replayed prompts come and go in one thread; the others never see them."""
    model, batch = tiny_model(family), padded_batch()
    allocator = make_allocator(model) if family == "falcon" else with_healing(model)
    expected = model.generate(**batch, **GREEDY)
    allocated = allocator.generate(model, **batch, **GREEDY)
    stop, found = threading.Event(), []

    def stock() -> None:
        while not stop.is_set():
            found.append(torch.equal(model.generate(**batch, **GREEDY), expected))

    with ThreadPoolExecutor(3) as threads, ExitStack() as ending:
        ending.callback(stop.set)
        others = [threads.submit(stock) for _ in range(3)]
        same = [torch.equal(allocator.generate(model, **batch, **GREEDY), allocated) for _ in range(12)]
    assert [other.result() for other in others] == [None] * 3
    assert len(found) > 3
    assert all(found), f"{found.count(False)} of {len(found)} answers of the stock model are wrong"
    assert all(same)


def test_the_decision_waits_for_the_device_once(model, allocator, monkeypatch) -> None:
    """Everything that waits reads a value on the host; only the features may."""
    batch, waits = padded_batch(), []
    with apply_plan(model, FULL):
        pass
    selector = allocator.selector()
    for name in ("cpu", "item", "tolist", "__bool__", "__int__", "__float__", "numpy"):
        original = getattr(torch.Tensor, name)

        def spy(self, *args, name=name, original=original, **kwargs):
            waits.append(name)
            return original(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, spy)
    run_prefix(model, **batch, depth=2, keep_cache=True)
    of_the_library = len(waits)  # building masks looks at the padding
    waits.clear()
    selector.decide(model, **batch, keep_cache=True)
    own = waits[of_the_library:]
    assert own.count("cpu") == 1
    assert set(own) <= {"cpu", "numpy"}
