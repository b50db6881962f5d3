"""A name for a model's weights, made from the weights themselves."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from transformers import PreTrainedModel

from backbone.families import decoder_layers

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
