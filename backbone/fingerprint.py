"""A name for a model's weights, made from the weights themselves."""

from __future__ import annotations

import hashlib

import torch
from transformers import PreTrainedModel

from backbone.families import decoder_layers

FINGERPRINT_VALUES = 64
"""Values of each parameter that its fingerprint is made from."""


@torch.no_grad()
def model_fingerprint(model: PreTrainedModel) -> str:
    """A name for a model's weights as they are now, such as `gemma3_text-18x640-0123456789ab`.

    Made from the shape and 64 values of every parameter, rounded to bfloat16: a checkpoint has one name whatever its
    source and device, and whether it was stored or loaded in float32 or in bfloat16. (float16 rounds otherwise: a
    float16 copy of float32 weights has another name, as it has other weights.) Takes some milliseconds.
    """
    described, values = hashlib.sha256(), []
    for name, parameter in sorted(model.named_parameters()):
        described.update(f"{name}{tuple(parameter.shape)}".encode())
        flat = parameter.detach().reshape(-1)
        part = flat[:: max(1, flat.numel() // FINGERPRINT_VALUES)][:FINGERPRINT_VALUES]
        values.append(part.to(model.device, torch.bfloat16))  # so that one transfer brings all of them
    described.update(torch.cat(values).float().cpu().numpy().tobytes())
    config = model.config
    return f"{config.model_type}-{len(decoder_layers(model))}x{config.hidden_size}-{described.hexdigest()[:12]}"
