"""A loaded model: where it keeps its layers, whether they are as its configuration says, and a name for its weights."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import PreTrainedModel

from backbone.errors import UnsupportedModelError
from backbone.execution.live_changes import replaced
from backbone.model_source import FAMILIES, Family, check_supported
from backbone.plan import SublayerBytes


def family_of(model: PreTrainedModel) -> Family:
    """The family of a causal language model; an undeclared one is probed, and then only whole layers can be skipped.

    Raises:
        UnsupportedModelError: see `check_supported`; a model that is wrapped or has no list of layers.
    """
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            f"a plan needs the transformers model itself, got a {type(model).__name__}; pass the model inside, such as "
            "model.get_base_model() of PEFT or the one that torch.compile was given"
        )
    if model not in _known:
        check_supported(model.config)
        _known[model] = FAMILIES.get(model.config.model_type) or _probed_family(model)
    return _known[model]


_known: WeakKeyDictionary[nn.Module, Family] = WeakKeyDictionary()


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


def final_norm(model: PreTrainedModel) -> nn.Module | None:
    """The norm between the last layer and the head: the last norm among the decoder's own modules; None for none."""
    children = decoder_of(model).named_children()
    norms = [module for name, module in children if "norm" in name or name.startswith("ln_")]
    return norms[-1] if norms else None


def check_intact(model: PreTrainedModel) -> None:
    """Check that the layers of a model are those that its configuration tells of, each once and in order.

    The library runs as many layers as the configuration says, and has every layer write into the place of a cache that
    it was made for; a plan counts the layers in the list.

    Raises:
        UnsupportedModelError: layers were deleted, added, swapped or shared, or the configuration was edited.
    """
    layers = list(decoder_layers(model))
    config = model.config.get_text_config(decoder=True)
    found = [("num_hidden_layers", config.num_hidden_layers)]
    if kinds := getattr(config, "layer_types", None):
        found.append(("the length of layer_types", len(kinds)))
    for name, number in found:
        if number != len(layers):
            raise UnsupportedModelError(
                f"this {type(model).__name__} holds {len(layers)} layers, and {name} in its configuration is {number}; "
                "plans need all of them: leave layers out with LayerPlan.skipping instead"
            )
    places: dict[nn.Module, int] = {}
    for index, layer in enumerate(layers):
        own = (place for part in layer.modules() if (place := getattr(part, "layer_idx", None)) is not None)
        if (made_as := places.setdefault(layer, next(own, index))) != index:
            raise UnsupportedModelError(
                f"layer {index} of this {type(model).__name__} was made as its layer {made_as}; plans need every layer "
                "once, in the place that it was made for"
            )


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


def _probed_family(model: PreTrainedModel) -> Family:
    """What can be seen of an undeclared model: where its layers are, and what one of them returns."""
    decoder, layers = _only_layer_list(model)
    output = _output_of_first_layer(model.get_submodule(decoder), layers)
    is_pair = isinstance(output, tuple) and len(output) == 2
    if not is_pair and not isinstance(output, torch.Tensor):
        raise _unknown(model, f"its layers return {type(output).__name__}, not hidden states")
    return Family(decoder, layers, attention=None, returns_tuple=is_pair)


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
    if not takes_cache:
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


FINGERPRINT_VALUES = 64
"""Values of each parameter that its fingerprint is made from."""

Key = Sequence[tuple[str, int, torch.dtype, torch.Size, tuple[int, ...]]]
"""Name, place in memory, dtype, shape and strides of every parameter."""

_views: WeakKeyDictionary[PreTrainedModel, tuple[Key, list[torch.Tensor]]] = WeakKeyDictionary()
"""The values to look at, as views into the weights, so that a change in place shows; made anew where weights moved."""


@torch.no_grad()
def model_fingerprint(model: PreTrainedModel) -> str:
    """A name for a model's weights as they are now, such as `gemma3_text-18x640-0123456789ab`.

    Made from the shape and 64 values of every parameter, rounded to bfloat16: a checkpoint has one name whatever its
    source and device, in float32 or bfloat16. A float16 copy has another. Takes some milliseconds the first time, and
    one or two afterwards.
    """
    parameters = sorted(model.named_parameters())
    key = [(name, p.data_ptr(), p.dtype, p.shape, p.stride()) for name, p in parameters]
    known, views = _views.get(model, (None, []))
    if known != key:
        views = [_part(parameter) for _, parameter in parameters]
        _views[model] = key, views
    views = [view if p.is_contiguous() else _part(p) for view, (_, p) in zip(views, parameters, strict=True)]
    described = hashlib.sha256("".join(f"{name}{tuple(p.shape)}" for name, p in parameters).encode())
    device = model.device
    values = torch.cat([view.to(device) for view in views]).to(torch.bfloat16)  # one transfer brings all of them
    described.update(values.float().cpu().numpy().tobytes())
    config = model.config
    return f"{config.model_type}-{len(decoder_layers(model))}x{config.hidden_size}-{described.hexdigest()[:12]}"


def _part(parameter: torch.Tensor) -> torch.Tensor:
    flat = parameter.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // FINGERPRINT_VALUES)][:FINGERPRINT_VALUES]
