"""Models that were changed before a plan came: the full plan gives what the stock model gives, or they are refused."""

import copy
import inspect
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import N_LAYERS, padded_batch, tiny_model
from transformers import DynamicCache

from backbone.errors import InputError, UnsupportedModelError
from backbone.execution.apply_plan import apply_plan, apply_plans
from backbone.execution.delete_layers import delete_layers
from backbone.families import decoder_layers, decoder_of
from backbone.plan import LayerPlan

FAMILIES = ("llama", "gemma3_text", "gpt2", "falcon")
FULL, SHORT = LayerPlan.full(N_LAYERS), LayerPlan.skipping(N_LAYERS, {0, 4})
GREEDY = {"max_new_tokens": 3, "do_sample": False}


def with_layer(model, index: int, layer) -> None:
    decoder_layers(model)[index] = layer


def swapped(model) -> None:
    layers = decoder_layers(model)
    layers[1], layers[2] = layers[2], layers[1]


def without_first(model, *, number: int) -> None:
    del decoder_layers(model)[0]
    model.config.num_hidden_layers = number


REFUSED = {
    "fewer layers claimed": (
        lambda m: setattr(m.config, "num_hidden_layers", 4),
        "holds 6 layers, and num_hidden_layers",
    ),
    "more layers claimed": (lambda m: setattr(m.config, "num_hidden_layers", 7), "in its configuration is 7"),
    "a layer deleted": (lambda m: without_first(m, number=6), "holds 5 layers, and num_hidden_layers"),
    "a layer deleted, and said so": (
        lambda m: without_first(m, number=5),
        "layer 0 of this .* was made as its layer 1|the length of layer_types in its configuration is 6",
    ),
    "layers swapped": (swapped, "layer 1 of this .* was made as its layer 2"),
    "a layer twice": (lambda m: with_layer(m, 3, decoder_layers(m)[2]), "layer 3 of this .* was made as its layer 2"),
    "a layer copied": (
        lambda m: with_layer(m, 3, copy.deepcopy(decoder_layers(m)[2])),
        "layer 3 of this .* was made as its layer 2",
    ),
    "more kinds of layers": (
        lambda m: setattr(m.config, "layer_types", ["full_attention"] * 7),
        "holds 6 layers, and the length of layer_types in its configuration is 7",
    ),
}
WRAPPED = {
    "PEFT": lambda m: get_peft_model(m, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")),
    "torch.compile": lambda m: torch.compile(m, backend="eager"),
    "DataParallel": torch.nn.DataParallel,
}


def caching_off(model):
    model.config.use_cache = model.generation_config.use_cache = False
    return model


def hooked(model):
    """With a steering vector, as interpretability work adds it."""
    decoder_layers(model)[2].register_forward_pre_hook(lambda layer, args: (args[0] + 0.1, *args[1:]))
    decoder_layers(model)[3].register_forward_hook(
        lambda layer, args, output: (output[0] * 0.9, *output[1:]) if isinstance(output, tuple) else output * 0.9
    )
    return model


def adapted(model):
    torch.manual_seed(0)
    return get_peft_model(
        model, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    ).get_base_model()


RIGHT = {
    "as it is": lambda m: m,
    "without a cache": caching_off,
    "hooks": hooked,
    "adapters": adapted,
    "layers deleted by layerbudget": lambda m: delete_layers(m, LayerPlan.skipping(N_LAYERS, {1})),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_model_with_changed_layers_is_refused(family) -> None:
    for name, (change, message) in REFUSED.items():
        model = tiny_model(family)
        if change is swapped:  # after the self-test, which comes once
            with apply_plan(model, FULL):
                pass
        change(model)
        for block in (apply_plan(model, FULL), apply_plans(model, [FULL, SHORT])):
            with pytest.raises(UnsupportedModelError, match=message), block:
                pytest.fail(name)


@pytest.mark.parametrize("name", WRAPPED)
def test_wrapped_model_is_refused_by_its_class(name) -> None:
    wrapped = WRAPPED[name](tiny_model("llama"))
    with pytest.raises(UnsupportedModelError, match=r"got a \w+; pass the model inside"), apply_plan(wrapped, FULL):
        pass


@pytest.mark.parametrize("name", RIGHT)
@pytest.mark.parametrize("family", FAMILIES)
def test_full_plan_of_a_changed_model_is_stock(family, name) -> None:
    model, batch = RIGHT[name](tiny_model(family)), padded_batch()
    full = LayerPlan.full(len(decoder_layers(model)))
    with torch.no_grad():
        stock, tokens = model(**batch).logits, model.generate(**batch, **GREEDY)
        with apply_plan(model, full):
            assert torch.equal(model(**batch).logits, stock)
            assert torch.equal(model.generate(**batch, **GREEDY), tokens)
        with apply_plan(model, LayerPlan.exiting(full.n_layers, 3)):
            cached = model.generate(**batch, **GREEDY)
            assert torch.equal(model.generate(**batch, **GREEDY, use_cache=False), cached)


def by_position(decoder, ids, cache):
    names = list(inspect.signature(decoder.forward).parameters)
    return decoder(ids, *[None] * (names.index("cache") - 1), cache)


CALLS = {
    "cache": lambda decoder, ids, cache: decoder(input_ids=ids, cache=cache),
    "past_key_values": lambda decoder, ids, cache: decoder(input_ids=ids, past_key_values=cache),
    "use_cache": lambda decoder, ids, cache: decoder(ids, past_key_values=cache, use_cache=True),
    "position": by_position,
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2", "opt", "gemma"])
def test_decoder_called_by_itself_keeps_its_cache(family, call) -> None:
    model, ids = tiny_model(family), padded_batch()["input_ids"][:1]
    decoder, run = decoder_of(model), CALLS[call]

    def decode() -> tuple[torch.Tensor, int]:
        cache = DynamicCache(config=model.config)
        run(decoder, ids[:, :6], cache)
        return run(decoder, ids[:, 6:], cache).last_hidden_state, cache.get_seq_length()

    with torch.no_grad():
        stock = decode()
        for block in (apply_plan(model, FULL), apply_plans(model, [FULL])):
            with block:
                found = decode()
            assert torch.equal(found[0], stock[0])
            assert found[1] == stock[1] == ids.shape[1]
        for block in (apply_plan(model, SHORT), apply_plans(model, [SHORT])):
            with block:
                whole = decoder(input_ids=ids, use_cache=False).last_hidden_state[:, 6:]
                torch.testing.assert_close(decode()[0], whole)


def test_rows_with_different_plans_keep_the_decoder_s_cache(model) -> None:
    ids, decoder = padded_batch()["input_ids"][:1].expand(2, -1), decoder_of(model)
    with torch.no_grad(), apply_plans(model, [FULL, SHORT]):
        whole = decoder(input_ids=ids, use_cache=False).last_hidden_state[:, 6:]
        cache = decoder(input_ids=ids[:, :6]).cache
        torch.testing.assert_close(decoder(ids[:, 6:], past_key_values=cache).last_hidden_state, whole)


def test_cache_under_both_names_is_refused(model) -> None:
    cache = DynamicCache(config=model.config)
    with apply_plan(model, FULL), pytest.raises(InputError, match="cache and past_key_values were both given"):
        decoder_of(model)(input_ids=padded_batch()["input_ids"], cache=cache, past_key_values=cache)


@pytest.mark.parametrize("block", [apply_plan, apply_plans])
def test_plan_without_with_warns(model, block) -> None:
    plan = FULL if block is apply_plan else [FULL, SHORT]
    with pytest.warns(RuntimeWarning, match=rf"{block.__name__}\(\.\.\.\) was dropped without `with`") as caught:
        block(model, plan)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with block(model, plan) as entered:
            assert entered is model
        assert block(model, plan)(lambda: 3)() == 3
