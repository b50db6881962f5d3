"""Values for every argument of `generate()`, and the tiny model that they are tried on."""

from __future__ import annotations

import inspect
from functools import cache
from inspect import signature

import torch
from tiny import padded_batch, tiny_model, tiny_tokenizer
from tiny_allocator import Ban, ByLength, Recorder, make_allocator
from transformers import (
    CompileConfig,
    ContinuousBatchingConfig,
    DynamicCache,
    GenerationConfig,
    StaticCache,
    SynthIDTextWatermarkingConfig,
    WatermarkingConfig,
)
from transformers.generation import StoppingCriteria

IDS = padded_batch()["input_ids"][:1]
S = IDS.shape[1]
BASE = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True, "output_scores": True}
TOKENS = [92, 56, 75, 36, 5, 74]
"""The stock model's answer to `IDS`."""


class AlwaysFull(ByLength):
    def _predict(self, features):
        losses = super()._predict(features)
        losses[:, :-1] = 1
        return losses


class StopAt(StoppingCriteria):
    def __call__(self, input_ids, scores, **_):
        return input_ids[:, -1] == TOKENS[3]


@cache
def own_model():
    model = tiny_model("llama", layer_scale=0.2)  # so that drafts are taken
    model.set_attn_implementation("eager")  # the only one that gives attentions
    return model


@cache
def own_allocator():
    return make_allocator(own_model(), controller=AlwaysFull())


def sampling(**options):
    return {"do_sample": True, **options}


def embeddings():
    return own_model().get_input_embeddings()(IDS).detach()


CASES = {
    "max_length": {"max_length": S + 3, "max_new_tokens": None},
    "max_new_tokens": {"max_new_tokens": 2},
    "min_length": {"min_length": S + 5, "eos_token_id": TOKENS[3]},
    "min_new_tokens": {"min_new_tokens": 5, "eos_token_id": TOKENS[3]},
    "early_stopping": {"num_beams": 2, "early_stopping": True},
    "max_time": {"max_time": 1e-9},
    "stop_strings": {"stop_strings": [tiny_tokenizer().decode(TOKENS[3])], "tokenizer": tiny_tokenizer()},
    "do_sample": sampling(),
    "num_beams": {"num_beams": 2},
    "use_cache": {"use_cache": False},
    "cache_implementation": {"cache_implementation": "static"},
    "cache_implementation: dynamic": {"cache_implementation": "dynamic"},
    "cache_implementation: offloaded": {"cache_implementation": "offloaded"},
    "cache_implementation: quantized": {"cache_implementation": "quantized"},
    "cache_config": {"cache_config": {"backend": "quanto"}},
    "max_cache_len": {"cache_implementation": "static", "max_cache_len": 64},
    "temperature": sampling(temperature=0.3),
    "top_k": sampling(top_k=2),
    "top_p": sampling(top_p=0.4),
    "min_p": sampling(min_p=0.3),
    "top_h": sampling(top_h=0.4),
    "typical_p": sampling(typical_p=0.4),
    "epsilon_cutoff": sampling(epsilon_cutoff=0.05),
    "eta_cutoff": sampling(eta_cutoff=0.05),
    "repetition_penalty": {"repetition_penalty": 3.0},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 3.0},
    "length_penalty": {"num_beams": 2, "length_penalty": 2.0},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
    "bad_words_ids": {"bad_words_ids": [[TOKENS[2]]]},
    "renormalize_logits": {"renormalize_logits": True},
    "forced_bos_token_id": {"forced_bos_token_id": 5, "input_ids": IDS[:, :1]},
    "forced_eos_token_id": {"forced_eos_token_id": 2},
    "remove_invalid_values": {"remove_invalid_values": True},
    "exponential_decay_length_penalty": {"exponential_decay_length_penalty": (2, 5.0)},
    "suppress_tokens": {"suppress_tokens": [TOKENS[2]]},
    "begin_suppress_tokens": {"begin_suppress_tokens": [TOKENS[0]]},
    "sequence_bias": {"sequence_bias": [[[5], 9.0]]},
    "token_healing": {"token_healing": True, "tokenizer": tiny_tokenizer()},
    "guidance_scale": {"guidance_scale": 2.0},
    "watermarking_config": {"watermarking_config": WatermarkingConfig(bias=9.0)},
    "watermarking_config: SynthID": sampling(watermarking_config=SynthIDTextWatermarkingConfig(3, keys=[3, 5])),
    "num_return_sequences": sampling(num_return_sequences=2),
    "output_attentions": {"output_attentions": True},
    "output_hidden_states": {"output_hidden_states": True},
    "output_scores": {"output_scores": False},
    "output_logits": {"output_logits": True},
    "return_dict_in_generate": {"return_dict_in_generate": False},
    "pad_token_id": {"pad_token_id": 5, "eos_token_id": TOKENS[3]},
    "bos_token_id": {"bos_token_id": 7, "input_ids": None},
    "eos_token_id": {"eos_token_id": [TOKENS[3]]},
    "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 1},
    "decoder_start_token_id": {"decoder_start_token_id": 3},
    "is_assistant": {"is_assistant": True},
    "num_assistant_tokens": {"num_assistant_tokens": 3},
    "num_assistant_tokens_schedule": {"num_assistant_tokens_schedule": "heuristic"},
    "assistant_confidence_threshold": {"assistant_confidence_threshold": 0.9},
    "max_matching_ngram_size": {"max_matching_ngram_size": 2},
    "assistant_lookbehind": {"assistant_lookbehind": 3},
    "target_lookbehind": {"target_lookbehind": 3},
    "assistant_ensemble_weight": sampling(assistant_ensemble_weight=0.01),
    "speculation_type": {"speculation_type": "dflash"},
    "compile_config": {"compile_config": CompileConfig()},
    "disable_compile": {"disable_compile": True},
    "continuous_batching_config": {"continuous_batching_config": ContinuousBatchingConfig()},
    "low_memory": {"low_memory": True},
    "diversity_penalty": {"diversity_penalty": 0.5},
    "prefill_chunk_size": {"prefill_chunk_size": 4},
    "inputs": {"inputs": IDS, "input_ids": None},
    "generation_config": {"generation_config": GenerationConfig(max_new_tokens=3), "max_new_tokens": None},
    "logits_processor": {"logits_processor": [Ban(TOKENS[2])]},
    "stopping_criteria": {"stopping_criteria": [StopAt()]},
    "prefix_allowed_tokens_fn": {"prefix_allowed_tokens_fn": lambda row, ids: [4, 5, 6 + len(ids)]},
    "streamer": {"streamer": Recorder()},
    "negative_prompt_ids": {"negative_prompt_ids": IDS[:, 3:], "guidance_scale": 2.0},
    "negative_prompt_attention_mask": {
        "negative_prompt_ids": IDS,
        "negative_prompt_attention_mask": torch.tensor([[0] * 3 + [1] * (S - 3)]),
        "guidance_scale": 2.0,
    },
    "input_ids": {"input_ids": IDS[:, 3:]},
    "attention_mask": {"attention_mask": torch.tensor([[0] * 3 + [1] * (S - 3)])},
    "position_ids": {"position_ids": torch.arange(S)[None] + 3},
    "cache": {"cache": lambda: DynamicCache(config=own_model().config)},
    "cache: static": {"cache": lambda: StaticCache(config=own_model().config, max_cache_len=64)},
    "past_key_values": {"past_key_values": lambda: DynamicCache(config=own_model().config)},
    "tokenizer": {"tokenizer": tiny_tokenizer()},
    "assistant_tokenizer": {"assistant_tokenizer": tiny_tokenizer()},
    "trust_remote_code": {"trust_remote_code": True},
    "use_mtp": {"use_mtp": True},
    "prompt_lookup_num_tokens": {"prompt_lookup_num_tokens": 3},
    "assistant_early_exit": {"assistant_early_exit": 2},
    "penalty_alpha": {"penalty_alpha": 0.6},
    "penalty_alpha: sampling": sampling(penalty_alpha=0.6),
    "dola_layers": {"dola_layers": "low"},
    "num_beam_groups": {"num_beams": 2, "num_beam_groups": 2},
    "constraints": {"constraints": [object()], "num_beams": 2},
    "force_words_ids": {"force_words_ids": [[5]], "num_beams": 2},
    "assistant_model": {"assistant_model": lambda: tiny_model("llama", seed=1)},
    "synced_gpus": {"synced_gpus": True},
    "custom_generate": {"custom_generate": lambda model, input_ids, **loop: model._sample(input_ids, **loop)},
    "inputs_embeds": {"inputs_embeds": embeddings, "input_ids": None},
    "inputs_embeds: with tokens": {"inputs_embeds": embeddings},
}
"""`argument: variant` -> what is given; a function without parameters makes a fresh value."""


def given(case: str) -> dict:
    arguments = {"input_ids": IDS, **BASE, **CASES[case]}
    makers = {
        name for name, value in arguments.items() if inspect.isfunction(value) and not signature(value).parameters
    }
    fresh = {name: value() if name in makers else value for name, value in arguments.items()}
    if "streamer" in fresh:
        fresh["streamer"] = Recorder()
    absent = {"input_ids", "max_new_tokens"}
    return {name: value for name, value in fresh.items() if value is not None or name not in absent}
