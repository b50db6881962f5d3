"""Prompts in, texts out: what the command line does with an allocator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from backbone.plan import LayerPlan
from oracle.chat import padded_prompts
from oracle.decoding import Decoding, cut_at_stop
from oracle.labels.generate_answers import stop_token_ids


@dataclass(frozen=True, slots=True)
class AllocatedText:
    """A generated text, and the plan that it was generated with."""

    text: str
    plan: LayerPlan


def generate_texts(
    generate: Callable[..., Any],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    decoding: Decoding,
) -> list[AllocatedText]:
    """Continue each of `prompts` [B], rendered, as one batch, by `allocator.generate`."""
    inputs = padded_prompts(tokenizer, prompts).to(model.device)
    output = generate(
        model,
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        return_dict_in_generate=True,
        **decoding_options(tokenizer, decoding),
    )
    assert not isinstance(output, torch.Tensor)
    texts = new_texts(tokenizer, output.sequences, inputs["input_ids"].shape[1], decoding)
    return [AllocatedText(text, plan) for text, plan in zip(texts, output["plans"], strict=True)]


def decoding_options(tokenizer: PreTrainedTokenizerBase, decoding: Decoding) -> dict[str, Any]:
    """The arguments of `generate()` for the decoding that an allocator was made with."""
    return decoding.arguments(tokenizer, list(stop_token_ids(tokenizer, decoding)))


def new_texts(
    tokenizer: PreTrainedTokenizerBase, sequences: torch.Tensor, prompt_width: int, decoding: Decoding
) -> list[str]:
    """The texts that follow the prompts in sequences [B, S], cut at the stop string."""
    texts = tokenizer.batch_decode(sequences[:, prompt_width:], skip_special_tokens=True)
    return [cut_at_stop(text, decoding.stop) for text in texts]
