"""Prompts in, texts out: what the command line does with an allocator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from backbone.plan import LayerPlan
from oracle.answering import stop_token_ids
from oracle.decoding import Decoding, cut_at_stop
from runtime.allocator import Allocator


@dataclass(frozen=True, slots=True)
class AllocatedText:
    """A generated text, and the plan that it was generated with."""

    text: str
    plan: LayerPlan


def generate_texts(
    allocator: Allocator,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    decoding: Decoding,
) -> list[AllocatedText]:
    """Continue each of `prompts` [B] under the plan that the allocator chooses for it, as one batch."""
    inputs = tokenizer(list(prompts), return_tensors="pt", padding=True).to(model.device)
    output = allocator.generate(
        model,
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=decoding.max_new_tokens,
        do_sample=False,
        eos_token_id=list(stop_token_ids(tokenizer, decoding.stop)),
        pad_token_id=tokenizer.pad_token_id,
        return_dict_in_generate=True,
    )
    assert not isinstance(output, torch.Tensor)
    new_tokens = output.sequences[:, inputs["input_ids"].shape[1] :]
    texts = tokenizer.batch_decode(new_tokens, skip_special_tokens=True)
    pairs = zip(texts, output["layer_plans"], strict=True)
    return [AllocatedText(cut_at_stop(text, decoding.stop), plan) for text, plan in pairs]
