"""What the project relies on in transformers and torch beyond their documented names, in one table.

A new version says by name what it has taken away. Whether it still does the same, the conformance suites say.
"""

import inspect
from functools import reduce
from importlib import import_module

import pytest
import transformers
from transformers import DynamicCache

TRIED = ("5.24",)
"""Minor versions of transformers that all tests have passed with."""

ATTRIBUTES: dict[str, str] = {
    "transformers.cache_utils:DummyLayer": "stands where a plan skips attention; masks and lengths pass over it",
    "transformers.cache_utils:DummyLayer.update": "SkippedLayer gives it a sentence for a model that runs the layer",
    "transformers.cache_utils:CacheLayerMixin.get_seq_length": "whether a layer of a cache is filled",
    "transformers.cache_utils:CacheLayerMixin.reorder_cache": "layers that hold some rows do it with these alone",
    "transformers.cache_utils:DynamicLayer.batch_select_indices": "likewise",
    "transformers.cache_utils:DynamicLayer.batch_repeat_interleave": "likewise",
    "transformers.cache_utils:DynamicSlidingWindowLayer": "lossless decoding takes back drafted tokens in it",
    "transformers:Cache.update": "a replayed prompt writes keys and values with it",
    "transformers:DynamicCache.is_linear": "models that keep no keys and values are refused by it",
    "transformers:PreTrainedModel.get_compiled_call": "replaced under a plan, which needs a graph of its own",
    "transformers:PreTrainedModel._default_compile_config": "what generate() compiles with unless told otherwise",
    "transformers:GenerationMixin._sample": "the loop that an allocator runs for greedy decoding and sampling",
    "transformers:GenerationMixin._beam_search": "the loop that it runs for beams",
    "transformers:GenerationMixin._assisted_decoding": "the loop of lossless decoding",
    "transformers:GenerationMixin._get_candidate_generator": "lossless decoding puts its drafter there",
    "transformers:GenerationMixin._prepare_special_tokens": "which tokens pad prompts, as generate() has it",
    "transformers:GenerationMixin._prepare_attention_mask_for_generation": "the mask of prompts given without one",
    "transformers:GenerationMixin.init_continuous_batching": "refused under a plan, since it starts a thread",
    "transformers:GenerationConfig._get_default_generation_params": "which values of a new argument ask for nothing",
    "transformers.generation.candidate_generator:CandidateGenerator.get_candidates": "what a drafter implements",
    "transformers.generation.configuration_utils:GenerationMode": "which loop a configuration asks for",
    "transformers.models.llama.modeling_llama:apply_rotary_pos_emb": "token exits turn the keys of layers left out",
    "transformers.pytorch_utils:Conv1D": "the linear layer of GPT-2, whose weight lies the other way round",
    "transformers.utils.chat_template_utils:render_jinja_template": "renders chat templates without a tokenizer",
    "torch.nn:Module._compiled_call_impl": "a model that was compiled by the user is refused by it",
    "torch.compiler:assume_constant_result": "a graph is traced for one thread",
}
"""`module:name` -> what for."""

ARGUMENTS: dict[str, tuple[str, ...]] = {
    "transformers:GenerationMixin.generate": ("custom_generate", "streamer", "assistant_model", "synced_gpus"),
    "transformers:DynamicCache.__init__": ("config",),
    "transformers:GenerationMixin._sample": ("logits_processor", "stopping_criteria", "generation_config"),
}
"""`module:name` -> parameters that it must have."""

OF_INSTANCES: dict[str, str] = {
    "cache.layer_class_to_replicate": "the layers of a cache that grows; they are made before a plan is fitted",
    "cache.layers": "the layers of a cache, which placeholders replace",
    "model.config._attn_implementation": "flex_attention has masks that cannot be cut into rows",
}
"""Attributes that instances have, tried on a tiny model."""


def found(place: str) -> object:
    module, _, path = place.partition(":")
    return reduce(getattr, path.split("."), import_module(module))


def test_the_version_is_one_that_was_tried() -> None:
    assert transformers.__version__.rsplit(".", 1)[0] in TRIED


@pytest.mark.parametrize("place", ATTRIBUTES)
def test_names_are_there(place) -> None:
    assert found(place) is not None or place.endswith("_compiled_call_impl")


@pytest.mark.parametrize("place", ARGUMENTS)
def test_parameters_are_there(place) -> None:
    assert set(ARGUMENTS[place]) <= inspect.signature(found(place)).parameters.keys()


def test_attributes_of_instances_are_there(model) -> None:
    instances = {"cache": DynamicCache(), "model": model}
    for place in OF_INSTANCES:
        name, *path = place.split(".")
        reduce(getattr, path, instances[name])
