"""One prepared `generate()` call, decoded in one pass for all rows, each under its prompt's plan."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from transformers import LogitsProcessorList
from transformers.generation.utils import GenerateBeamDecoderOnlyOutput, GenerateDecoderOnlyOutput

from backbone.execution.apply_plan import apply_plans
from backbone.execution.prompt_prefix import Prefix, replaying
from backbone.plan import LayerPlan, PlanMenu
from runtime.deciding import Decider
from runtime.device_clock import FirstToken, Moment
from runtime.request import Request

Output = torch.Tensor | GenerateDecoderOnlyOutput | GenerateBeamDecoderOnlyOutput


def plans_of(request: Request, menu: PlanMenu, decider: Decider) -> tuple[list[LayerPlan], Prefix | None]:
    """The plans of the prompts [B], and what the first layers made of them, None where that is not kept. A cache that
    was passed in goes on under its own plans."""
    if (plans := request.plans_of_cache()) is not None:
        return plans, None
    decision = decider.decide(request.model, **request.prompts(), keep_cache=not request.captures_layers)
    return [menu.plans[index] for index in decision.chosen], decision.prefix


def decode(request: Request, plans: Sequence[LayerPlan], prefix: Prefix | None, start: Moment) -> tuple[Output, float]:
    """Decode with the model's own loop, which sees all rows in their order.

    Args:
        request: the prepared call.
        plans: of the B prompts.
        prefix: what the first layers made of the prompts, from which their plans go on; None to run them again. Its
            memory is given back.
        start: when the call began.

    Returns:
        The output, and the milliseconds from `start` to the first tokens.
    """
    clock = FirstToken(request.model.device)
    loop = {**request.loop, "logits_processor": LogitsProcessorList([*request.loop["logits_processor"], clock])}
    with apply_plans(request.model, plans), ExitStack() as stack:
        if prefix is not None:
            rows = torch.arange(request.n_prompts, device=request.model.device).repeat_interleave(request.copies)
            chosen = None if request.copies == 1 else rows
            stack.enter_context(replaying(request.model, prefix, chosen, release=True))
        output: Output = request.decoding_loop(
            request.input_ids, generation_config=request.config, **loop, **request.kwargs
        )
    return output, clock.moment.ms_since(start) if clock.moment else 0.0
