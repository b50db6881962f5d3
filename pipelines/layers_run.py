"""Whether `generate()` runs the layers that were certified: both decide by themselves, and must not part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from backbone.errors import InputError
from backbone.plan import LayerPlan
from oracle.spread import spread
from runtime.allocator import Allocator
from runtime.texts import generate_texts

COMPARED = 16
"""Prompts that are compared, at most."""
ROUNDED = 0.25
"""Share of them, and one at least, whose plan may be another: features of a batch are rounded otherwise than those of a
single prompt, which moves some decisions that were close."""


class LayersError(InputError):
    """`generate()` runs other layers than were certified."""


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
        LayersError: too many plans differ.
    """
    timed, one = replace(allocator, drift=None), replace(allocator.decoding, max_new_tokens=1)
    shortened = [(text, plan) for text, plan in zip(texts, certified, strict=True) if not plan.is_full]
    pairs = [
        (plan, generate_texts(timed.generate, model, tokenizer, [text], one)[0].plan)
        for text, plan in spread(shortened, COMPARED)
    ]
    differ = sum(plan != ran for plan, ran in pairs)
    if differ > max(1, ROUNDED * len(pairs)):
        wanted, found = (sum(pair[which].layers for pair in pairs) / len(pairs) for which in (0, 1))
        raise LayersError(
            f"generate() runs {found:.1f} of {allocator.menu.n_layers} layers where "
            f"{wanted:.1f} were certified ({differ} of {len(pairs)} test prompts run another plan), so the certificate "
            "does not hold; warnings above this line say why plans were not followed"
        )
