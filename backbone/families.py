"""Where each model family keeps its layers and their sub-layers: one line a family, nothing copied from it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from backbone.errors import InputError
from backbone.plan import SublayerBytes


class UnsupportedModelError(InputError):
    """A model whose layers cannot be skipped exactly; the message names the reason."""


@dataclass(frozen=True, slots=True)
class Family:
    """How to reach the layers of one `model_type`.

    Attributes:
        decoder: path from the causal language model to the module that runs the layers.
        layers: name of the list of layers in that module.
        attention: name of the attention block in a layer; it returns `(hidden, weights)`.
        mlp: name of the MLP block in a layer, or None where it cannot be skipped by itself.
        returns_tuple: a layer returns `(hidden, weights)` instead of `hidden`.
    """

    decoder: str
    layers: str
    attention: str
    mlp: str | None
    returns_tuple: bool = False


_LLAMA_LIKE = Family("model", "layers", "self_attn", "mlp")

FAMILIES: dict[str, Family] = {
    **dict.fromkeys(
        ("llama", "qwen2", "qwen3", "mistral", "phi", "phi3", "gemma2", "gemma3_text"),
        _LLAMA_LIKE,
    ),
    "opt": Family("model.decoder", "layers", "self_attn", None),
    "gpt2": Family("transformer", "h", "attn", "mlp"),
    "gpt_neox": Family("gpt_neox", "layers", "attention", "mlp"),
    "falcon": Family("transformer", "h", "self_attention", "mlp", returns_tuple=True),
    "bloom": Family("transformer", "h", "self_attention", None, returns_tuple=True),
}


def family_of(model: PreTrainedModel) -> Family:
    """The family of a causal language model.

    Raises:
        UnsupportedModelError: encoder-decoder, multimodal, KV-sharing and unknown models.
    """
    config = model.config
    kind = config.model_type
    if config.is_encoder_decoder:
        raise UnsupportedModelError(
            f"{kind} is an encoder-decoder model; layerbudget runs decoder-only language models"
        )
    if any(hasattr(config, part) for part in ("vision_config", "audio_config")):
        raise UnsupportedModelError(f"{kind} is multimodal; load its language model alone, for example gemma3_text")
    if getattr(config, "num_kv_shared_layers", 0):
        raise UnsupportedModelError(
            f"{kind} shares keys and values between layers, so a layer cannot be skipped exactly"
        )
    if kind not in FAMILIES:
        raise UnsupportedModelError(f"unknown model family {kind!r}; known are {', '.join(sorted(FAMILIES))}")
    return FAMILIES[kind]


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """The module that takes tokens and runs the layers: the model without its head."""
    return model.get_submodule(family_of(model).decoder)


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The L decoder layers of a model, in order."""
    layers = getattr(decoder_of(model), family_of(model).layers)
    assert isinstance(layers, nn.ModuleList)
    return layers


def sublayer_bytes(model: PreTrainedModel) -> SublayerBytes:
    """Parameter bytes of attention and of the MLP for each layer; what is not attention counts as MLP."""
    family = family_of(model)
    sizes = []
    for layer in decoder_layers(model):
        attention = _parameter_bytes(layer.get_submodule(family.attention))
        sizes.append((attention, _parameter_bytes(layer) - attention))
    return sizes


def _parameter_bytes(module: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())
