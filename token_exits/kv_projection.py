"""KV projection: keys and values of a state without running the layer.

Works for the families listed here. Before its first use a model is compared with its own cache.

Shapes: `R` rows, `S` tokens, `D` hidden size, `H` key-value heads, `d` head size.
"""

from __future__ import annotations

import sys
from typing import Any
from weakref import WeakSet

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from backbone.errors import UnsupportedModelError
from backbone.execution.live_changes import Forward, captured, replaced
from backbone.families import decoder_layers, decoder_of

FAMILIES = ("gemma2", "gemma3_text", "granite", "llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe")
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
HALF_TOLERANCE = 0.02
"""Largest relative difference, in the Frobenius norm, between projected keys and those of a cache."""

KeysValues = tuple[torch.Tensor, torch.Tensor]
"""Keys and values, [R, H, S, d] each."""


def project(layer: Any, states: torch.Tensor, position_embeddings: KeysValues) -> KeysValues:
    """Keys and values that `layer` would cache for states [R, S, D].

    Args:
        position_embeddings: cosines and sines [R or 1, S, d], as the model hands them to the layer.
    """
    attention, normed = layer.self_attn, layer.input_layernorm(states)
    shape = (*states.shape[:-1], -1, attention.head_dim)
    keys, values = attention.k_proj(normed).view(shape), attention.v_proj(normed).view(shape)
    if hasattr(attention, "k_norm"):
        keys = attention.k_norm(keys)
    # The family's own function rotates queries too: here those of no head, which cost nothing.
    rotate, keys = sys.modules[type(attention).__module__].apply_rotary_pos_emb, keys.transpose(1, 2)
    return rotate(keys[:, :0], keys, *position_embeddings)[1], values.transpose(1, 2)


_checked: WeakSet[nn.Module] = WeakSet()


@torch.no_grad()
def check_projections(model: PreTrainedModel) -> None:
    """Raises UnsupportedModelError unless `project` gives what this model's own layers keep, up to rounding."""
    if model in _checked:
        return
    if (kind := model.config.model_type) not in FAMILIES:
        raise UnsupportedModelError(
            f"token exits cannot project the keys and values of {kind}; known are {', '.join(FAMILIES)}"
        )
    if model.config._attn_implementation not in ("sdpa", "eager"):
        raise UnsupportedModelError(
            f"token exits need an attention that takes masks by row, got {model.config._attn_implementation}; load the "
            "model with attn_implementation='sdpa'"
        )
    if (difference := _difference(model)) > (limit := TOLERANCE.get(model.dtype, HALF_TOLERANCE)):
        raise UnsupportedModelError(
            f"{kind}: projected keys and values differ by {difference:.1%} from those that its layers cache (at most "
            f"{limit:.1%} is rounding), so tokens cannot leave its layers"
        )
    _checked.add(model)


def _difference(model: PreTrainedModel) -> float:
    """The largest relative difference in any layer, over four tokens."""
    layers, decoder = decoder_layers(model), decoder_of(model)
    ids = torch.arange(1, 5, device=model.device)[None] % model.config.vocab_size
    cache = DynamicCache(config=model.config)
    embeddings: dict[int, KeysValues] = {}

    def recorded(index: int, forward: Forward) -> Forward:
        def run(*args: Any, **kwargs: Any) -> Any:
            embeddings[index] = kwargs["position_embeddings"]
            return forward(*args, **kwargs)

        return run

    changes = [(layer, "forward", recorded(index, layer.forward)) for index, layer in enumerate(layers)]
    with replaced(changes), captured(layers, range(len(layers))) as states:
        decoder(input_ids=ids, cache=cache, use_cache=True)
    largest = 0.0
    for index, layer in enumerate(layers):
        cached: Any = cache.layers[index]
        expected = torch.cat((cached.keys, cached.values), -1).float()
        projected = torch.cat(project(layer, states[index], embeddings[index]), -1).float()
        largest = max(largest, float((projected - expected).norm() / expected.norm()))
    return largest
