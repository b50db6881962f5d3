"""A tiny model as a GGUF file, whole or with something wrong with it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import gguf
import numpy as np
from tiny import N_LAYERS, VOCABULARY, tiny_model

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers.": "blk.",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "post_attention_layernorm": "ffn_norm",
    "input_layernorm": "attn_norm",
}
KEYS: dict[str, int | float] = {
    "context_length": 256,
    "embedding_length": 32,
    "block_count": N_LAYERS,
    "feed_forward_length": 64,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.layer_norm_rms_epsilon": 1e-6,
}


def write_gguf(
    path: Path,
    *,
    without: Collection[str] = (),
    keys: Mapping[str, int] | None = None,
    tensors: Mapping[str, np.ndarray] | None = None,
) -> Path:
    """The tiny Qwen 2 in GGUF.

    Args:
        without: names of tensors, and of keys behind the architecture's, that are left out.
        keys: other values of keys.
        tensors: other tensors, or more of them.
    """
    writer = gguf.GGUFWriter(path, "qwen2")
    for key, value in {**KEYS, **(keys or {})}.items():
        if key not in without:
            (writer.add_uint32 if isinstance(value, int) else writer.add_float32)(f"qwen2.{key}", value)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(
        [*(chr(code) for code in range(33, 33 + VOCABULARY - 4)), "ab", *("<|x|>", "<|y|>", "<|endoftext|>")]
    )
    writer.add_token_types([1] * (VOCABULARY - 3) + [3] * 3)
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(VOCABULARY - 1)
    for name, tensor in {**_tensors(), **(tensors or {})}.items():
        if name not in without:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _tensors() -> dict[str, np.ndarray]:
    found = {}
    for name, weight in tiny_model("qwen2").state_dict().items():
        for ours, theirs in NAMES.items():
            name = name.replace(ours, theirs)
        found[name] = weight.numpy()
    return found
