"""Fit the bridges of many plans at once, on the states that the model, or the shortened model, really produces."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from transformers import PreTrainedModel

from backbone.execution.live_changes import captured
from backbone.execution.plan_patches import patched
from backbone.families import decoder_layers, decoder_of
from backbone.left_padding import by_tokens, in_halves, padded_inputs
from backbone.plan import LayerPlan
from backbone.stand_ins.attaching import Attached
from backbone.stand_ins.bridges import Bridge
from backbone.stand_ins.ridge_regression import Fit, Moments, fit_bridge
from backbone.stand_ins.settings import Form

Fits = dict[LayerPlan, dict[int, Fit]]
"""For each plan its fitted bridges, by the first layer of the gap."""

HELD = 8
"""Every so many-th sequence is held out, to choose the ridge strength by."""

Gap = tuple[LayerPlan, range]
Passed = tuple[dict[int, torch.Tensor], dict[Gap, torch.Tensor], torch.Tensor, torch.Tensor]
"""Of one batch: the full model's states by depth, the states before each gap, which places hold tokens [B, S], and
which rows are held out [B, 1]."""


@torch.no_grad()
def fit_bridges(
    model: PreTrainedModel,
    sequences: Sequence[Sequence[int]],
    plans: Sequence[LayerPlan],
    *,
    form: Form = "full",
    rank: int = 64,
    in_order: bool = False,
    batch_tokens: int = 4096,
    advance: Callable[[int], None] = lambda done: None,
) -> Fits:
    """A bridge for every gap of every plan.

    Args:
        sequences: token ids of prompts with their answers.
        plans: shortened plans; gaps are runs of layers that are skipped as a whole.
        form, rank: see `fit_bridge`.
        in_order: fit a plan's second and later gaps on the states that it produces with its bridges so far, in as many
            passes over the sequences as the plan has gaps; otherwise all on the full model's states, in one.
        batch_tokens: tokens that run together.
        advance: called with the number of sequences that were run.
    """
    fits: Fits = {plan: {} for plan in plans}
    for number in range(bridging_rounds(plans, in_order)):
        wanted = [(plan, gap) for plan in plans for gap in (plan.gaps[number : number + 1] if in_order else plan.gaps)]
        sums = _sums(model, sequences, wanted, fits if number else None, batch_tokens, advance)
        known: dict[int, Fit] = {}
        for (plan, gap), (fitted, held) in sums.items():
            if id(fitted) not in known:
                known[id(fitted)] = fit_bridge(fitted, held, form, rank)
            fits[plan][gap.start] = known[id(fitted)]
    return fits


def bridges_of(fits: Fits) -> dict[LayerPlan, dict[int, Bridge]]:
    """The maps alone."""
    return {plan: {first: fit.bridge for first, fit in of_plan.items()} for plan, of_plan in fits.items()}


def bridging_rounds(plans: Sequence[LayerPlan], in_order: bool) -> int:
    """How often `fit_bridges` runs all sequences: under the full plan, and under plans with earlier gaps."""
    return max(len(plan.gaps) for plan in plans) if in_order else 1


def _sums(
    model: PreTrainedModel,
    sequences: Sequence[Sequence[int]],
    wanted: Sequence[Gap],
    fits: Fits | None,
    batch_tokens: int,
    advance: Callable[[int], None],
) -> dict[Gap, tuple[Moments, Moments]]:
    """For each gap the sums over fitted and over held tokens; one object for gaps whose states are the same."""
    size, device = model.config.get_text_config().hidden_size, model.device
    made: dict[Any, tuple[Moments, Moments]] = {}
    sums = {}
    for plan, gap in wanted:
        same = gap if fits is None else (plan, gap)
        sums[plan, gap] = made.setdefault(same, (Moments(size, device), Moments(size, device)))
    ends = {layer for _, gap in wanted for layer in (gap.start, gap.stop)}
    places = {id(fitted): place for place, (fitted, _) in sums.items()}.values()

    def passed(batch: Sequence[tuple[int, Sequence[int]]]) -> list[Passed]:
        inputs = padded_inputs(model, [tokens for _, tokens in batch])
        full = _states(model, inputs, ends)
        before = {(plan, gap): full[gap.start] for plan, gap in wanted}
        if fits is not None:
            before = _shortened(model, inputs, wanted, fits)
        held = torch.tensor([index % HELD == 0 for index, _ in batch], device=device)[:, None]
        return [(full, before, inputs["attention_mask"].bool(), held)]

    for batch in by_tokens(list(enumerate(sequences)), [len(tokens) for tokens in sequences], batch_tokens):
        for full, before, mask, held in in_halves(batch, passed):
            for place in places:
                for moments, rows in zip(sums[place], (mask & ~held, mask & held), strict=True):
                    moments.add(before[place][rows].to(device), full[place[1].stop][rows].to(device))
        advance(len(batch))
    return sums


def _shortened(
    model: PreTrainedModel, inputs: dict[str, torch.Tensor], wanted: Sequence[Gap], fits: Fits
) -> dict[Gap, torch.Tensor]:
    """The state before each gap as the shortened model with its bridges so far produces it."""
    return {
        (plan, gap): _states(
            model, inputs, {gap.start}, plan, {first: fit.bridge for first, fit in fits[plan].items()}
        )[gap.start]
        for plan, gap in wanted
    }


def _states(
    model: PreTrainedModel,
    inputs: dict[str, torch.Tensor],
    depths: set[int],
    plan: LayerPlan | None = None,
    bridges: dict[int, Bridge] | None = None,
) -> dict[int, torch.Tensor]:
    """States [B, S, D] before the layers `depths`; before layer L means after the last."""
    attached = Attached("", {plan: bridges}) if plan is not None and bridges is not None else None
    running = nullcontext() if plan is None else patched(model, plan, attached=attached)
    with running, captured(decoder_layers(model), depths) as states:
        decoder_of(model)(**inputs, use_cache=False)
    return states
