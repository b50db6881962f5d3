"""Where each model family keeps its layers and their sub-layers: one line a family, nothing copied from it."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from backbone.errors import InputError
from backbone.execution.live_changes import replaced
from backbone.plan import SublayerBytes


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


def family_of(model: PreTrainedModel) -> Family:
    """The family of a causal language model; an undeclared one is probed, and then only whole layers can be skipped.

    Whether the plans of a probed model are exact, `backbone.execution.self_test` says before the first one is applied.

    Raises:
        UnsupportedModelError: encoder-decoder, multimodal and KV-sharing models, and those without a list of layers.
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
    return FAMILIES[kind] if kind in FAMILIES else _probed_family(model)


def check_is_model(model: Any) -> None:
    """Raises UnsupportedModelError for anything that cannot be a model, such as a name or a tokenizer."""
    if isinstance(model, str | Path):
        raise UnsupportedModelError(
            f"a model is needed, got the name {str(model)!r:.80}; load it first: "
            f"model, tokenizer = load_backbone({str(model)!r:.80})"
        )
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(f"a model is needed, got a {type(model).__name__}; give the model first")


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """The module that takes tokens and runs the layers: the model without its head."""
    return model.get_submodule(family_of(model).decoder)


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The L decoder layers of a model, in order."""
    family = family_of(model)
    layers = getattr(model.get_submodule(family.decoder), family.layers)
    assert isinstance(layers, nn.ModuleList)
    return layers


def sublayer_bytes(model: PreTrainedModel) -> SublayerBytes:
    """Parameter bytes of attention and of the MLP for each layer; what is not attention counts as MLP."""
    attention = family_of(model).attention
    sizes = []
    for layer in decoder_layers(model):
        part = 0 if attention is None else _parameter_bytes(layer.get_submodule(attention))
        sizes.append((part, _parameter_bytes(layer) - part))
    return sizes


def _parameter_bytes(module: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())


_probed: WeakKeyDictionary[nn.Module, Family] = WeakKeyDictionary()


def _probed_family(model: PreTrainedModel) -> Family:
    """What can be seen of an undeclared model: where its layers are, and what one of them returns."""
    if model not in _probed:
        decoder, layers = _only_layer_list(model)
        output = _output_of_first_layer(model.get_submodule(decoder), layers)
        is_pair = isinstance(output, tuple) and len(output) == 2
        if not is_pair and not isinstance(output, torch.Tensor):
            raise _unknown(model, f"its layers return {type(output).__name__}, not hidden states")
        _probed[model] = Family(decoder, layers, attention=None, returns_tuple=is_pair)
    return _probed[model]


def _only_layer_list(model: PreTrainedModel) -> tuple[str, str]:
    n_layers = getattr(model.config, "num_hidden_layers", None)
    paths = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == n_layers and "." in name
    ]
    if len(paths) != 1:
        raise _unknown(model, f"it has {len(paths)} lists of {n_layers} modules where one list of layers is needed")
    decoder, _, layers = paths[0].rpartition(".")
    takes_cache = "cache" in inspect.signature(model.get_submodule(decoder).forward).parameters
    if not takes_cache or all(DynamicCache(config=model.config).is_linear):
        raise _unknown(model, f"its {decoder} keeps no key-value cache")
    return decoder, layers


@torch.no_grad()
def _output_of_first_layer(decoder: nn.Module, layers: str) -> object:
    first, outputs = getattr(decoder, layers)[0], []
    forward = first.forward

    def keep(*args: Any, **kwargs: Any) -> Any:
        outputs.append(forward(*args, **kwargs))
        return outputs[-1]

    with replaced([(first, "forward", keep)]):
        device = next(decoder.parameters()).device
        decoder(input_ids=torch.zeros(1, 2, dtype=torch.long, device=device), use_cache=False)
    return outputs[0] if outputs else None


def _unknown(model: PreTrainedModel, reason: str) -> UnsupportedModelError:
    known = ", ".join(sorted(FAMILIES))
    return UnsupportedModelError(f"unknown model family {model.config.model_type!r}: {reason}; declared are {known}")
