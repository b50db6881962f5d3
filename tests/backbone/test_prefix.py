"""Whatever goes on from a prefix equals the same computation from the start, and computes no layer twice."""

from contextlib import contextmanager

import pytest
import torch
from tiny import N_LAYERS, OPTIONS, UNDECLARED, padded_batch, tiny_model
from transformers import CompileConfig

from backbone.execution.apply_plan import apply_plan
from backbone.execution.prompt_prefix import joined, probe_states, replaying, run_prefix
from backbone.families import decoder_layers, decoder_of
from backbone.left_padding import padded_inputs, position_inputs
from backbone.plan import LayerPlan
from backbone.testing import patches

DEPTH = 2
PLANS = [LayerPlan.full(N_LAYERS), LayerPlan.skipping(N_LAYERS, {2, 4}), LayerPlan.exiting(N_LAYERS, DEPTH)]
GREEDY = {"max_new_tokens": 8, "do_sample": False}
CACHES = {
    "dynamic": {},
    "static": {"cache_implementation": "static"},
    "none": {"use_cache": False},
    "beams": {"num_beams": 2},
    "chunks": {"prefill_chunk_size": 3},
    "static chunks": {"prefill_chunk_size": 4, "cache_implementation": "static"},
}
BROKEN = {("falcon", "static chunks")}
"""What stock `generate()` cannot do: transformers 5.23 makes falcon's static cache for chunks with too many heads."""


def prefix_of(model, batch, keep_cache=True):
    positions = position_inputs(decoder_of(model), batch["attention_mask"])
    return run_prefix(model, **batch, depth=DEPTH, keep_cache=keep_cache, **positions)


@contextmanager
def counted_tokens(model):
    """Tokens of a row that each layer computes, seen by its MLP."""
    counts = [0] * N_LAYERS
    hooks = []
    for index, layer in enumerate(decoder_layers(model)):

        def count(module, args, output, index=index):
            counts[index] += output.shape[-2]

        hooks.append(layer.mlp.register_forward_hook(count))
    try:
        yield counts
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("family", [*sorted(OPTIONS), *UNDECLARED])
def test_generation_from_a_prefix_equals_generation_from_the_start(family) -> None:
    model, batch = tiny_model(family), padded_batch()
    prefix = prefix_of(model, batch)
    wrong = []
    for plan in PLANS:
        for name, cache in CACHES.items():
            if (family, name) in BROKEN:
                continue
            with apply_plan(model, plan):
                expected = model.generate(**batch, **GREEDY, **cache)
                rows = torch.arange(len(expected)).repeat_interleave(2) if "num_beams" in cache else None
                with replaying(model, prefix, rows):
                    found = model.generate(**batch, **GREEDY, **cache)
            if not torch.equal(found, expected):
                wrong.append((str(plan), name))
    assert wrong == []
    assert patches(model) == patches(tiny_model(family))


def test_rows_may_be_chosen_and_repeated() -> None:
    model, batch = tiny_model("mistral"), padded_batch()
    rows = torch.tensor([3, 1, 1])
    chosen = {name: tensor[rows] for name, tensor in batch.items()}
    prefix = prefix_of(model, batch)
    with apply_plan(model, PLANS[1]):
        expected = model.generate(**chosen, **GREEDY)
        with replaying(model, prefix, rows):
            assert torch.equal(model.generate(**chosen, **GREEDY), expected)


@pytest.mark.parametrize("family", ["gemma3_text", "bloom", "falcon", "gpt2", "mistral"])
def test_prompts_may_be_kept_by_themselves_and_joined_anew(family) -> None:
    model, batch = tiny_model(family), padded_batch()
    lengths = batch["attention_mask"].sum(1).tolist()
    kept = prefix_of(model, batch).by_row(lengths)
    assert [row.states[-1].shape[1] for row in kept] == lengths
    shorter = sorted(range(len(lengths)), key=lengths.__getitem__)[:3][::-1]
    rows = [batch["input_ids"][row, -lengths[row] :].tolist() for row in shorter]
    others = {name: padded_inputs(model, rows)[name] for name in ("input_ids", "attention_mask")}
    assert others["input_ids"].shape[1] < batch["input_ids"].shape[1], "the new batch has another width"
    with apply_plan(model, PLANS[1]):
        expected = model.generate(**others, **GREEDY)
        anew = joined([kept[row] for row in shorter], model.device)
        with counted_tokens(model) as counts, replaying(model, anew):
            found = model.generate(**others, **GREEDY)
    assert torch.equal(found, expected)
    assert counts[:DEPTH] == [7] * DEPTH, "only new tokens pass the first layers"


def test_no_layer_computes_a_token_twice() -> None:
    model, batch = tiny_model("llama"), padded_batch()
    with apply_plan(model, PLANS[1]):
        pass  # the self-test is over
    with counted_tokens(model) as counts:
        prefix = prefix_of(model, batch)
        assert counts == [11] * DEPTH + [0] * (N_LAYERS - DEPTH)
        with apply_plan(model, PLANS[1]), replaying(model, prefix):
            model.generate(**batch, **GREEDY)
    assert counts == [11 + 7 if i in PLANS[1].attention else 0 for i in range(N_LAYERS)]


def test_states_are_those_of_every_depth() -> None:
    model, batch = tiny_model("gemma3_text"), padded_batch()
    states = prefix_of(model, batch, keep_cache=False).states
    assert len(states) == DEPTH + 1
    mask = batch["attention_mask"].bool()
    for depth in range(1, DEPTH + 1):
        expected = probe_states(model, batch["input_ids"], batch["attention_mask"], depth)[-1]
        torch.testing.assert_close(states[depth][mask], expected[mask])
    assert prefix_of(model, batch, keep_cache=False).keys_values == ()


def test_a_compiled_step_is_traced_after_the_replay() -> None:
    model, batch = tiny_model("llama"), padded_batch()
    config = CompileConfig(mode=None, backend="eager")
    config._compile_all_devices = True
    compiled = {**GREEDY, "cache_implementation": "static", "compile_config": config}
    other = padded_inputs(model, [[5, 6, 7], [8, 9, 10, 11, 12]])
    prefixes = [prefix_of(model, {name: inputs[name] for name in batch}) for inputs in (batch, other)]
    for chunks in ({}, {"prefill_chunk_size": 4}):
        for inputs, prefix in zip((batch, other), prefixes, strict=True):
            with apply_plan(model, PLANS[1]):
                expected = model.generate(**inputs, **GREEDY)
                with replaying(model, prefix):
                    assert torch.equal(model.generate(**inputs, **compiled, **chunks), expected)


def test_an_interrupted_replay_leaves_nothing_behind() -> None:
    model, batch = tiny_model("llama"), padded_batch()
    prefix, before = prefix_of(model, batch), patches(model)
    too_long = torch.ones(4, 12, dtype=torch.long)
    with (
        pytest.raises(AssertionError, match="the prefix has 11 tokens"),
        apply_plan(model, PLANS[1]),
        replaying(model, prefix),
    ):
        model(too_long)
    assert patches(model) == before
    stock = tiny_model("llama").generate(**batch, **GREEDY)
    assert torch.equal(model.generate(**batch, **GREEDY), stock)
