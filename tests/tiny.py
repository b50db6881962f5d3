"""Tiny random models of every declared family and of some others: 6 layers, deterministic weights, fast."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from backbone.execution.apply_plan import apply_plan
from backbone.execution.shared_passes import SharedPasses
from backbone.families import decoder_layers
from backbone.healing.healing import ReadyHealing
from backbone.plan import LayerPlan

N_LAYERS = 6
VOCABULARY = 97

COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LLAMA_LIKE = {"intermediate_size": 64, "num_key_value_heads": 2}
_HYBRID = {**_LLAMA_LIKE, "head_dim": 8, "sliding_window": 6}
_LAYER_KINDS = ["sliding_attention", "sliding_attention", "full_attention"] * (N_LAYERS // 3)

OPTIONS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA_LIKE,
    "qwen2": _LLAMA_LIKE,
    "qwen3": {**_LLAMA_LIKE, "head_dim": 8},
    "mistral": {**_LLAMA_LIKE, "sliding_window": 6},
    "phi": {"intermediate_size": 64},
    "phi3": _LLAMA_LIKE,
    "gemma2": {**_HYBRID, "layer_types": _LAYER_KINDS},
    "gemma3_text": {**_HYBRID, "layer_types": _LAYER_KINDS},
    "olmo2": _LLAMA_LIKE,
    "stablelm": _LLAMA_LIKE,
    "granite": {**_LLAMA_LIKE, "residual_multiplier": 0.7},
    "cohere2": {**_HYBRID, "layer_types": _LAYER_KINDS},
    "smollm3": {**_LLAMA_LIKE, "no_rope_layer_interval": 3},
    "mixtral": {**_LLAMA_LIKE, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {
        **_LLAMA_LIKE,
        "head_dim": 8,
        "moe_intermediate_size": 32,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "mlp_only_layers": [1],
    },
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "gpt2": {"n_positions": 256},
    "gpt_neox": {"intermediate_size": 64},
    "falcon": {},
    "bloom": {"tie_word_embeddings": False, "initializer_range": 0.1},
}

UNDECLARED: dict[str, dict[str, Any]] = {
    "gemma": {**_LLAMA_LIKE, "head_dim": 8},
    "gptj": {"n_positions": 256, "rotary_dim": 4},
    "starcoder2": _LLAMA_LIKE,
}
"""Families without an entry in `backbone.families`."""


def tiny_model(family: str, *, seed: int = 0, layer_scale: float = 1.0, **options: Any) -> PreTrainedModel:
    config = AutoConfig.for_model(family, **{**COMMON, **{**OPTIONS, **UNDECLARED}.get(family, _LLAMA_LIKE), **options})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():  # spread the logits, so that greedy tokens do not hang on rounding
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3.0)
        for layer in decoder_layers(model):
            for parameter in layer.parameters():
                parameter.mul_(layer_scale)
    return model  # type: ignore[no-any-return]


def padded_batch(seed: int = 1) -> dict[str, torch.Tensor]:
    """Four prompts of 11, 9, 7 and 4 tokens, left-padded."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(3, VOCABULARY, (4, 11), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    for row, padding in enumerate((0, 2, 4, 7)):
        attention_mask[row, :padding] = 0
        input_ids[row, :padding] = 0
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A token a character: the printable ASCII characters but the last two, and the newline."""
    characters = [chr(code) for code in range(32, 32 + VOCABULARY - 5)]
    words = ["<pad>", "<bos>", "<eos>", "<unk>", "\n", *characters]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r".|\n"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def check_shared_passes(
    model: PreTrainedModel, order: Sequence[LayerPlan], healing: ReadyHealing | None = None
) -> None:
    """Shared passes in this order give each plan's own logits bit for bit, with fewer layers."""
    batch, shared = padded_batch(), SharedPasses(model, order, healing)
    with torch.no_grad():
        for plan in order:
            with apply_plan(model, plan, healing):
                expected = model(**batch, use_cache=False).logits
            with shared.next_plan() as running:
                assert running == plan
                assert torch.equal(model(**batch, use_cache=False).logits, expected)
    assert shared.layers_run < sum(plan.layers for plan in order)
