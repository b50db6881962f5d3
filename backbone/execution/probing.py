"""Read the hidden states of the first layers of a prompt."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from backbone.execution.prompt_prefix import run_prefix
from backbone.families import decoder_of
from backbone.left_padding import position_inputs


@torch.inference_mode()
def probe_states(
    model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor, depth: int
) -> list[torch.Tensor]:
    """Hidden states before and after each of the first `depth` layers; no later layer and no head is computed.

    Args:
        model: the model, without a plan.
        input_ids: prompt tokens, int64 [B, S], left-padded.
        attention_mask: 1 for tokens, 0 for padding [B, S].
        depth: number of layers that run, at least 1.

    Returns:
        depth + 1 states [B, S, D] in the model's dtype: the embeddings, then after each layer; those of padding are
        meaningless.
    """
    positions = position_inputs(decoder_of(model), attention_mask)
    return list(run_prefix(model, input_ids, attention_mask, depth, keep_cache=False, **positions).states)
