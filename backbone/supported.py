"""Which models layerbudget runs, as far as a configuration tells: one line a family, nothing copied from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from backbone.errors import InputError

if TYPE_CHECKING:  # torch, which `layerbudget check` does without for declared families
    from transformers import PreTrainedConfig


class UnsupportedModelError(InputError):
    """A model whose layers cannot be skipped exactly; the message names the reason."""


@dataclass(frozen=True, slots=True)
class Family:
    """How to reach the layers of one `model_type`.

    Attributes:
        decoder: path from the causal language model to the module that runs the layers.
        layers: name of the list of layers in that module.
        attention: name of the attention block in a layer, which returns `(hidden, weights)`; None where unknown,
            and then only whole layers can be skipped.
        mlp: names of the modules of a layer that make up its MLP, in the order in which they run.
        returns_tuple: a layer returns `(hidden, weights)` instead of `hidden`.
        adds_residual: attention and MLP are called with `(hidden, residual)` and return their output plus the residual.
    """

    decoder: str
    layers: str
    attention: str | None
    mlp: tuple[str, ...] = ()
    returns_tuple: bool = False
    adds_residual: bool = False


_LLAMA_LIKE = Family("model", "layers", "self_attn", ("mlp",))

FAMILIES: dict[str, Family] = {
    **dict.fromkeys(
        (
            *("llama", "qwen2", "qwen3", "mistral", "phi", "phi3", "gemma2", "gemma3_text", "olmo2", "stablelm"),
            *("granite", "cohere2", "smollm3", "mixtral", "qwen3_moe"),
        ),
        _LLAMA_LIKE,
    ),
    "opt": Family("model.decoder", "layers", "self_attn", ("fc1", "fc2")),
    "gpt2": Family("transformer", "h", "attn", ("mlp",)),
    "gpt_neox": Family("gpt_neox", "layers", "attention", ("mlp",)),
    "falcon": Family("transformer", "h", "self_attention", ("mlp",), returns_tuple=True),
    "bloom": Family("transformer", "h", "self_attention", ("mlp",), returns_tuple=True, adds_residual=True),
}


ATTENTION = frozenset({"full_attention", "sliding_attention", "chunked_attention"})
"""Kinds of layers, as `config.layer_types` calls them, of declared families."""


def check_supported(config: PreTrainedConfig | Mapping[str, Any]) -> None:
    """Whether a model with such a configuration can skip layers. Needs no weights.

    Args:
        config: of transformers, or the content of `config.json`. Of a declared family's mapping nothing is imported.

    Raises:
        UnsupportedModelError: encoder-decoder, multimodal and KV-sharing models; hybrids and other models whose layers
            keep a recurrent state instead of keys and values.
    """
    given = config.get if isinstance(config, Mapping) else lambda name: getattr(config, name, None)
    kind = given("model_type")
    if given("is_encoder_decoder"):
        raise UnsupportedModelError(
            f"{kind} is an encoder-decoder model; layerbudget runs decoder-only language models"
        )
    if any(given(part) is not None for part in ("vision_config", "audio_config")):
        raise UnsupportedModelError(f"{kind} is multimodal; load its language model alone, for example gemma3_text")
    if given("num_kv_shared_layers"):
        raise UnsupportedModelError(
            f"{kind} shares keys and values between layers, so a layer cannot be skipped exactly"
        )
    if kind in FAMILIES and ATTENTION.issuperset(given("layer_types") or ()):
        return
    if state := _state_beside_keys(config):
        raise UnsupportedModelError(
            f"{kind} is not made of attention layers alone: {state}; layerbudget cannot skip layers of such models yet"
        )


def _state_beside_keys(config: PreTrainedConfig | Mapping[str, Any]) -> str | None:
    """What layers keep beside keys and values, as a clause; None for nothing, or where a model has to be loaded."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, DynamicCache
    from transformers.cache_utils import DynamicLayer, LinearAttentionCacheLayerMixin

    try:
        if isinstance(config, Mapping):
            config = AutoConfig.for_model(**config)
        model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
        text = config.get_text_config(decoder=True)
        layers = DynamicCache(config=text).layers
    except Exception:  # a model with code or kinds of layers of its own is known once it is loaded
        return None
    kinds = getattr(text, "layer_types", None)
    if kinds is None and getattr(model_class, "_is_stateful", False):
        return "they keep a recurrent state"
    for index, layer in enumerate(layers):
        if not isinstance(layer, DynamicLayer) or isinstance(layer, LinearAttentionCacheLayerMixin):
            kind = f" ({kinds[index]})" if kinds else ""
            return f"layer {index}{kind} keeps no keys and values but a {type(layer).__name__}"
    return None
