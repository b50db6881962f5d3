"""Read the hidden states of the first layers of a prompt."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from backbone.families import decoder_layers, decoder_of
from backbone.plan import LayerPlan
from backbone.positions import position_inputs
from backbone.running import apply_plan


def probe(model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor, depth: int) -> torch.Tensor:
    """Hidden states after the first `depth` layers [B, S, D]; see `probe_states`."""
    return probe_states(model, input_ids, attention_mask, depth)[-1]


@torch.inference_mode()
def probe_states(
    model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor, depth: int
) -> list[torch.Tensor]:
    """Hidden states before and after each of the first `depth` layers; no later layer and no head is computed.

    Args:
        input_ids: prompt tokens, int64 [B, S], left-padded.
        attention_mask: 1 for tokens, 0 for padding [B, S].
        depth: number of layers that run, at least 1.

    Returns:
        depth + 1 states [B, S, D] in the model's dtype: the embeddings, then after each layer; those of padding are
        meaningless.
    """
    decoder, layers = decoder_of(model), decoder_layers(model)
    states: list[torch.Tensor] = []

    def keep_input(module: Any, args: Any, kwargs: Any) -> None:
        states.append(args[0] if args else kwargs["hidden_states"])

    def keep_output(module: Any, args: Any, output: Any) -> None:
        states.append(output[0] if isinstance(output, tuple) else output)

    with apply_plan(model, LayerPlan.exiting(len(layers), depth), frozen=True):
        hooks = [layers[0].register_forward_pre_hook(keep_input, with_kwargs=True)]
        hooks += [layer.register_forward_hook(keep_output) for layer in layers[:depth]]
        try:
            positions = position_inputs(decoder, attention_mask)
            decoder(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **positions)
        finally:
            for hook in hooks:
                hook.remove()
    return states
