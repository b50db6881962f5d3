"""Run the rows of one prepared `generate()` call in lanes, with the model's own decoding loops."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor

from backbone.execution.apply_plan import apply_plan
from backbone.execution.prompt_prefix import Prefix, replaying
from backbone.plan import PlanMenu
from runtime.deciding import Decider
from runtime.device_clock import FirstToken, Moment
from runtime.lanes import Lane, lane_a_plan, least_time_lanes
from runtime.merging import Output, merged
from runtime.request import Request
from runtime.step_costs import known_step_costs


def lanes_of(
    request: Request, menu: PlanMenu, decider: Decider, max_lanes: int | None, round_up: bool
) -> tuple[list[Lane], Prefix | None]:
    """Decide about the prompts and put them into lanes; a cache that was passed in goes on under its own plan.

    Args:
        max_lanes: at most so many lanes.
        round_up: False puts every prompt under exactly the plan that was chosen for it.

    Returns:
        The lanes, and what the first layers made of the prompts, None where that is not kept.
    """
    if (plan := request.plan_of_cache()) is not None:
        return [Lane(plan, tuple(range(request.n_prompts)))], None
    decision = decider.decide(request.model, **request.prompts(), keep_cache=not request.captures_layers)
    if not round_up:
        return lane_a_plan(menu, decision.chosen), decision.prefix
    costs = known_step_costs(request.model)
    lane_ms = costs.generation_ms(request.input_ids.shape[1], request.max_new_tokens, request.copies)
    most = 1 if request.one_lane_reason else max_lanes
    return least_time_lanes(menu, decision.chosen, lane_ms, max_lanes=most), decision.prefix


def decode_in_lanes(
    request: Request, lanes: Sequence[Lane], prefix: Prefix | None, start: Moment
) -> tuple[Output, list[float]]:
    """Decode every lane under its plan, one after the other.

    Args:
        prefix: what the first layers made of the prompts, from which the lanes go on; None to run them again. Its
            memory is given back.
        start: when the call began.

    Returns:
        The output, rows in input order, and for each prompt the milliseconds from `start` to its first token.
    """
    clocks = [FirstToken(request.model.device) for _ in lanes]
    outputs = [
        _decoded(request, lane, len(lanes) == 1, prefix, lane is lanes[-1], clock)
        for lane, clock in zip(lanes, clocks, strict=True)
    ]
    first_token_ms = [0.0] * request.n_prompts
    for lane, clock in zip(lanes, clocks, strict=True):
        for prompt in lane.prompts:
            first_token_ms[prompt] = clock.moment.ms_since(start) if clock.moment else 0.0
    output: Output = outputs[0] if len(outputs) == 1 else merged(outputs, lanes, request)
    return output, first_token_ms


def _decoded(
    request: Request, lane: Lane, is_only: bool, prefix: Prefix | None, is_last: bool, clock: FirstToken
) -> Output:
    rows = torch.tensor([prompt * request.copies + i for prompt in lane.prompts for i in range(request.copies)])
    input_ids, kwargs = (request.input_ids, request.kwargs) if is_only else _rows_of(request, rows)
    processors = [_for_rows(processor, rows) for processor in request.loop["logits_processor"]]
    loop = {**request.loop, "logits_processor": LogitsProcessorList([*processors, clock])}
    with apply_plan(request.model, lane.plan), ExitStack() as stack:
        if prefix is not None:
            repeated = None if is_only and request.copies == 1 else (rows // request.copies).to(request.model.device)
            stack.enter_context(replaying(request.model, prefix, repeated, release=is_last))
        output: Output = request.decoding_loop(input_ids, generation_config=request.config, **loop, **kwargs)
        return output


def _for_rows(processor: Any, rows: torch.Tensor) -> Any:
    """A logits processor for some rows: of those that work in lanes, one of the library's holds a number for each."""
    lengths = getattr(processor, "prompt_ignore_length", None)
    if isinstance(processor, RepetitionPenaltyLogitsProcessor) and isinstance(lengths, torch.Tensor):
        return RepetitionPenaltyLogitsProcessor(processor.penalty, lengths[rows.to(lengths.device)])
    return processor


def _rows_of(request: Request, rows: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
    """Some rows of the prepared arguments, with an empty cache of the kind that `generate()` made for all."""
    index = rows.to(request.input_ids.device)
    kwargs = {
        name: value[index] if isinstance(value, torch.Tensor) and len(value) == len(request.input_ids) else value
        for name, value in request.kwargs.items()
        if name != "cache"
    }
    if request.cache is not None:
        # The library's own method, since it knows all kinds: dynamic, static, offloaded, quantised.
        prompts, length = len(rows) // request.copies, int(request.config.max_length or 0) - 1
        request.model._prepare_cache_for_generation(request.config, kwargs, request.mode, prompts, length)  # type: ignore[operator]
    return request.input_ids[index], kwargs
