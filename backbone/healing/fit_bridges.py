"""Fit the bridges of many plans at once, on states of the full model or of the shortened one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from backbone.errors import InputError
from backbone.execution.executor import executing
from backbone.execution.live_changes import captured
from backbone.families import decoder_layers, decoder_of
from backbone.healing.healing import Bridge, ReadyHealing
from backbone.healing.ridge_regression import Fit, Moments, fit_bridge
from backbone.healing.settings import Form
from backbone.left_padding import by_tokens, in_halves, padded_inputs
from backbone.plan import LayerPlan

Fits = dict[LayerPlan, dict[int, Fit]]
"""For each plan its fitted bridges, by the first layer of the gap."""

HELD = 8
"""One of every `HELD` sequences is held out, the first among them; held-out tokens choose the ridge strength."""

Gap = tuple[LayerPlan, range]
Batch = Sequence[tuple[int, Sequence[int]]]
"""Number and token ids of each sequence."""
Sums = list[tuple[Moments, Moments]]
"""Sums over the fitted and over the held-out tokens, one pair for all gaps that have the same states."""
Over = Callable[["BatchSums", Sequence[Batch]], Iterable[tuple[int, Sums]]]
"""Makes the sums of batches elsewhere; yields the number of each batch, in any order, and its sums."""
Passed = tuple[dict[int, torch.Tensor], dict[Gap, torch.Tensor], torch.Tensor, torch.Tensor]
"""One batch: the full model's states by depth, the states before each gap, the mask of tokens [B, S] (False for
padding), and the mask of held-out rows [B, 1]."""


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
    over: Over | None = None,
) -> Fits:
    """Fit a bridge for every gap of every plan.

    Args:
        sequences: token ids of prompts with their answers; at least 2.
        plans: shortened plans; gaps are runs of layers that are skipped as a whole.
        form, rank: see `fit_bridge`.
        in_order: fit a plan's gaps one after another, each on the states of the plan with its earlier bridges. This
            takes one pass over the sequences for each gap. Otherwise all gaps are fitted on the full model's states.
        batch_tokens: tokens of a batch, padding included.
        advance: called after each batch with its number of sequences.
        over: makes the sums of all batches, for example in many processes; default: in this process.

    Raises:
        InputError: fewer than 2 sequences.
        UnsupportedModelError: the model's states are not finite.
    """
    if len(sequences) < 2:
        raise InputError(f"{len(sequences)} sequences are too few to fit bridges on; give at least 2, one is held out")
    fits: Fits = {plan: {} for plan in plans}
    batches = by_tokens(list(enumerate(sequences)), [len(tokens) for tokens in sequences], batch_tokens)
    for number in range(bridging_rounds(plans, in_order)):
        wanted = [(plan, gap) for plan in plans for gap in (plan.gaps[number : number + 1] if in_order else plan.gaps)]
        summing = BatchSums(wanted, bridges_of(fits) if number else None)
        sums = _sums(model, batches, summing, over, advance)
        known: dict[int, Fit] = {}
        for (plan, gap), (fitted, held) in sums.items():
            if id(fitted) not in known:
                known[id(fitted)] = fit_bridge(fitted, held, form, rank)
            fits[plan][gap.start] = known[id(fitted)]
    return fits


def bridges_of(fits: Fits) -> dict[LayerPlan, dict[int, Bridge]]:
    """The bridges of fits, without what else is known of each fit."""
    return {plan: {first: fit.bridge for first, fit in of_plan.items()} for plan, of_plan in fits.items()}


def bridging_rounds(plans: Sequence[LayerPlan], in_order: bool) -> int:
    """How many passes over all sequences `fit_bridges` makes."""
    return max(len(plan.gaps) for plan in plans) if in_order else 1


def _sums(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    summing: BatchSums,
    over: Over | None,
    advance: Callable[[int], None],
) -> dict[Gap, tuple[Moments, Moments]]:
    """Sums of each gap over the fitted and the held-out tokens; gaps with the same states share one pair."""
    total = summing.nothing(model)
    if over is None:
        for batch in batches:
            summing.add(model, batch, total)
            advance(len(batch))
    else:
        for number, sums in _by_number(over(summing, batches)):
            for own, others in zip(total, sums, strict=True):
                for moments, more in zip(own, others, strict=True):
                    moments.merge(more)
            advance(len(batches[number]))
    return {gap: total[place] for gap, place in summing.places().items()}


def _by_number(made: Iterable[tuple[int, Sums]]) -> Iterator[tuple[int, Sums]]:
    """Yield the sums of batches by ascending number, since rounding depends on the order of addition."""
    early: dict[int, Sums] = {}
    wanted = 0
    for number, sums in made:
        early[number] = sums
        while wanted in early:
            yield wanted, early.pop(wanted)
            wanted += 1


@dataclass(frozen=True)
class BatchSums:
    """Adds batches to the sums of gaps.

    Attributes:
        wanted: the gaps, each with its plan.
        bridges: of the earlier gaps, with which each plan runs to give its states; None for the full model's states.
    """

    wanted: Sequence[Gap]
    bridges: dict[LayerPlan, dict[int, Bridge]] | None

    def places(self) -> dict[Gap, int]:
        """Index of each gap's sums in `Sums`; gaps with the same states share it."""
        found: dict[Any, int] = {}
        return {
            (plan, gap): found.setdefault(gap if self.bridges is None else (plan, gap), len(found))
            for plan, gap in self.wanted
        }

    def nothing(self, model: PreTrainedModel) -> Sums:
        """Sums over no tokens."""
        size, device = model.config.get_text_config().hidden_size, model.device
        return [(Moments(size, device), Moments(size, device)) for _ in set(self.places().values())]

    @torch.no_grad()
    def add(self, model: PreTrainedModel, batch: Batch, sums: Sums) -> None:
        """Add the tokens of a batch to `sums`."""
        gaps = {place: gap for gap, place in reversed(self.places().items())}
        for full, before, mask, held in in_halves(batch, lambda part: [self._run(model, part)]):
            for place, (plan, gap) in gaps.items():
                for moments, rows in zip(sums[place], (mask & ~held, mask & held), strict=True):
                    states = before[plan, gap][rows], full[gap.stop][rows]
                    moments.add(states[0].to(model.device), states[1].to(model.device))

    def _run(self, model: PreTrainedModel, batch: Batch) -> Passed:
        inputs = padded_inputs(model, [tokens for _, tokens in batch])
        full = _states(model, inputs, {layer for _, gap in self.wanted for layer in (gap.start, gap.stop)})
        before = {(plan, gap): full[gap.start] for plan, gap in self.wanted}
        if self.bridges is not None:
            for plan, gap in self.wanted:
                before[plan, gap] = _states(model, inputs, {gap.start}, plan, self.bridges[plan])[gap.start]
        held = torch.tensor([index % HELD == 0 for index, _ in batch], device=model.device)[:, None]
        return full, before, inputs["attention_mask"].bool(), held


def _states(
    model: PreTrainedModel,
    inputs: dict[str, torch.Tensor],
    depths: set[int],
    plan: LayerPlan | None = None,
    bridges: Mapping[int, Bridge] | None = None,
) -> dict[int, torch.Tensor]:
    """States [B, S, D] before the layers `depths` (L: after the last), under the full model or a plan with bridges."""
    running = nullcontext() if plan is None else executing(model, [plan], ReadyHealing("", {plan: bridges or {}}))
    with running, captured(decoder_layers(model), depths) as states:
        decoder_of(model)(**inputs, use_cache=False)
    return states
