"""Whether `generate()` runs the layers that were certified: both decide by themselves, and must not part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from backbone.plan import LayerPlan
from oracle.batches import spread
from runtime.allocator import Allocator
from runtime.generation import check_layers
from runtime.texts import generate_texts

COMPARED = 16
"""Prompts that are compared, at most."""


def check_layers_run(
    allocator: Allocator,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    certified: Sequence[LayerPlan],
) -> None:
    """Generate a token for some prompts, one at a time, and compare plans.

    Args:
        allocator: the finished one.
        model, tokenizer: that it was made with.
        texts: rendered prompts.
        certified: plan of each prompt. Those of shortened plans are compared.

    Raises:
        OtherLayersError: see `runtime.generation.check_layers`.
    """
    timed, one = replace(allocator, drift=None), replace(allocator.decoding, max_new_tokens=1)
    shortened = [(text, plan) for text, plan in zip(texts, certified, strict=True) if not plan.is_full]
    compared = spread(shortened, COMPARED)
    ran = [generate_texts(timed.generate, model, tokenizer, [text], one)[0].plan for text, _ in compared]
    check_layers([plan for _, plan in compared], ran)
