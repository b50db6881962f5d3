"""One prepared `generate()` call, decoded in one pass for all rows, each under its prompt's plan."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack

import torch
from transformers import LogitsProcessorList
from transformers.generation.utils import GenerateBeamDecoderOnlyOutput, GenerateDecoderOnlyOutput

from backbone.errors import InputError
from backbone.execution.apply_plan import apply_plans
from backbone.execution.prompt_prefix import Prefix, replaying
from backbone.plan import LayerPlan, PlanMenu
from runtime.device_clock import FirstToken, Moment
from runtime.plan_selection import PlanSelector
from runtime.request import Request

MOST_OTHER_LAYERS = 0.05
"""Share of the decoder by which prompts may run more or fewer layers than was certified: rounding changes few plans."""

Output = torch.Tensor | GenerateDecoderOnlyOutput | GenerateBeamDecoderOnlyOutput


def plans_of(request: Request, menu: PlanMenu, selector: PlanSelector) -> tuple[list[LayerPlan], Prefix | None]:
    """The plans of the prompts [B], and what the first layers made of them, None where that is not kept. A cache that
    was passed in goes on under its own plans."""
    if (plans := request.plans_of_cache()) is not None:
        return plans, None
    decision = selector.decide(request.model, **request.prompts(), keep_cache=not request.captures_layers)
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


class OtherLayersError(InputError):
    """`generate` ran other layers than those that were certified."""


def check_layers(certified: Iterable[LayerPlan], ran: Iterable[LayerPlan]) -> None:
    """Compare the plans [N] that a certificate rests on with those that `generate` ran for the same prompts.

    Args:
        certified: for each prompt the plan that the certified policy chose.
        ran: the `plans` of the output of `allocator.generate`, or the plans of the texts of `generate_many`.

    Raises:
        OtherLayersError: the plans differ, on average over prompts, by more than `MOST_OTHER_LAYERS` of the layers.
    """
    pairs = list(zip(certified, ran, strict=True))
    differing = sum(len(one.attention ^ other.attention) + len(one.mlp ^ other.mlp) for one, other in pairs) / 2
    if differing > MOST_OTHER_LAYERS * sum(one.n_layers for one, _ in pairs):
        expected, found = (sum(plan.layers for plan in plans) / len(pairs) for plans in zip(*pairs, strict=True))
        raise OtherLayersError(
            f"generate ran {found:.2f} of {pairs[0][0].n_layers} layers on average, where {expected:.2f} were "
            f"certified ({differing / len(pairs):.2f} differ a prompt); a FullPlanWarning says why"
        )
