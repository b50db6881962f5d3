"""Read the hidden states of the first layers of a prompt."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from backbone.families import decoder_layers, decoder_of
from backbone.plan import LayerPlan
from backbone.positions import position_inputs
from backbone.running import apply_plan


@torch.inference_mode()
def probe(model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor, depth: int) -> torch.Tensor:
    """Hidden states after the first `depth` layers; no later layer and no head is computed.

    Args:
        input_ids: prompt tokens, int64 [B, S], left-padded.
        attention_mask: 1 for tokens, 0 for padding [B, S].
        depth: number of layers that run, at least 1.

    Returns:
        States [B, S, D] in the model's dtype; those of padding are meaningless.
    """
    decoder, layers = decoder_of(model), decoder_layers(model)
    states: list[torch.Tensor] = []

    def keep(module: Any, args: Any, output: Any) -> None:
        states.append(output[0] if isinstance(output, tuple) else output)

    with apply_plan(model, LayerPlan.exiting(len(layers), depth), frozen=True):
        hook = layers[depth - 1].register_forward_hook(keep)
        try:
            positions = position_inputs(decoder, attention_mask)
            decoder(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **positions)
        finally:
            hook.remove()
    return states[0]
