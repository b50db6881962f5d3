"""One pass for rows with different plans: each layer, or half of one, computes only the rows whose plan runs it.

The model's own code runs. Where only some rows run a module, its inputs are cut to these rows and what it returns is
put back among what the others have when it is skipped. Rows are told apart by the prompt that they belong to: a
prompt's beams or samples are neighbours and share its plan.

Masks and position embeddings, which come to every layer, are cut once in a pass for each set of rows. Rows of a set
that are neighbours in the batch are cut out as views, without a copy.

Shapes: `B` prompts, each in `c` neighbouring rows, `R = B * c` rows, `S` tokens, `D` hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from backbone.execution.cache import keep_rows, remember_plans
from backbone.execution.live_changes import replaced
from backbone.execution.plan_patches import (
    Forward,
    argument_names,
    check_can_run,
    named_arguments,
    pass_on,
    pass_on_with_none,
    residual,
    residual_with_none,
    zeros,
    zeros_with_none,
)
from backbone.execution.row_sets import Prompts, RowPlansError, RowSets, taken, with_rows
from backbone.families import UnsupportedModelError, decoder_layers, decoder_of, family_of
from backbone.healing.attaching import Attached, Swap
from backbone.healing.bridges import Bridge
from backbone.plan import LayerPlan

__all__ = ["RowPlansError", "patched_rows"]


@contextmanager
def patched_rows(model: PreTrainedModel, plans: Sequence[LayerPlan], attached: Attached | None) -> Iterator[None]:
    """Within this block and thread the rows of each prompt run its plan. No check but those of the plans.

    Args:
        model: the model.
        plans: of the B prompts; at least two differ.
        attached: what stands in for skipped layers, and the changes of weights that shortened plans run with.

    Raises:
        PlanError: a plan is for another number of layers.
        UnsupportedModelError: see `plan_patches.patched`; masks that cannot be cut.
    """
    for plan in plans:
        check_can_run(model, plan)
    if model.config._attn_implementation == "flex_attention":
        raise UnsupportedModelError("flex_attention has masks that cannot be cut into rows; load the model with sdpa")
    # Every mixture of plans would be a graph of its own: mixed steps run uncompiled.
    uncompiled = (model, "get_compiled_call", lambda config: model.__call__)
    forwards = _Patches(model, plans, attached).forwards()
    with replaced([*((module, "forward", forward) for module, forward in forwards), uncompiled]):
        yield


class _Patches:
    """The forwards that a mixture of plans puts in place of a model's own."""

    def __init__(self, model: PreTrainedModel, plans: Sequence[LayerPlan], attached: Attached | None) -> None:
        self._model, self._plans, self._attached = model, plans, attached
        self._layers, self._family = list(decoder_layers(model)), family_of(model)
        self._rows = RowSets(len(plans), int(model.config.get_text_config().num_attention_heads))

    def forwards(self) -> Iterator[tuple[nn.Module, Forward]]:
        for index in range(len(self._layers)):
            yield from self._of_layer(index)
        if self._attached is not None:
            shortened = self._of(lambda plan: not plan.is_full)
            for swap in self._attached.swaps:
                yield swap.module, self._swapping(swap, shortened)
        yield decoder_of(self._model), self._fitting_cache()

    def _of(self, holds: Callable[[LayerPlan], bool]) -> Prompts:
        """The prompts whose plan is such."""
        return tuple(prompt for prompt, plan in enumerate(self._plans) if holds(plan))

    def _of_layer(self, index: int) -> Iterator[tuple[nn.Module, Forward]]:
        """What changes in one layer."""
        family, layer = self._family, self._layers[index]
        attention, mlp = self._of(lambda plan: index in plan.attention), self._of(lambda plan: index in plan.mlp)
        either = self._of(lambda plan: index in plan.attention or index in plan.mlp)
        skip = pass_on_with_none if family.returns_tuple else pass_on
        forward = self._cutting(layer.forward, skip, either) if either else skip
        if bridges := self._bridges_at(index):
            forward = self._crossing(forward, bridges)
        if heads := self._bridges_at(len(self._layers)) if layer is self._layers[-1] else []:
            forward = self._crossing(forward, heads, behind=True)
        if heads or len(either) < len(self._plans):
            yield layer, forward
        if attention != either:
            block = getattr(layer, str(family.attention))
            left = residual_with_none if family.adds_residual else zeros_with_none
            yield block, self._cutting(block.forward, left, attention)
        if mlp != either and len(family.mlp) == 1:
            block = getattr(layer, family.mlp[0])
            yield block, self._cutting(block.forward, residual if family.adds_residual else zeros, mlp)
        elif mlp != either:  # several modules, between which the states are no longer told apart: computed, left out
            block = getattr(layer, family.mlp[-1])
            yield block, self._leaving_out(block.forward, mlp)

    def _bridges_at(self, index: int) -> list[tuple[Prompts, Bridge]]:
        """The bridges over gaps that begin with a layer, each with the prompts whose plan it belongs to."""
        if self._attached is None:
            return []
        found = {plan: self._attached.bridges.get(plan, {}).get(index) for plan in self._plans}
        return [
            (self._of(lambda own, plan=plan: own == plan), bridge)  # type: ignore[misc]
            for plan, bridge in found.items()
            if bridge is not None
        ]

    def _cutting(self, forward: Forward, skip: Forward, wanted: Prompts) -> Forward:
        """A module's forward for the rows of the prompts `wanted` alone; the others have what `skip` gives."""
        rows = self._rows

        def run(*args: Any, **kwargs: Any) -> Any:
            inside = rows.both(wanted)
            if inside is rows.current:
                return forward(*args, **kwargs)
            others = skip(*args, **kwargs)
            if not inside:
                return others
            cut_args, cut_kwargs = rows.cut_arguments(args, kwargs, inside)
            outer, rows.current = rows.current, inside
            try:
                own = forward(*cut_args, **cut_kwargs)
            finally:
                rows.current = outer
            if not isinstance(others, tuple):
                return with_rows(others, rows.places(inside, others.device), own)
            return (with_rows(others[0], rows.places(inside, others[0].device), own[0]), *own[1:])

        return run

    def _crossing(self, forward: Forward, bridges: Sequence[tuple[Prompts, Bridge]], behind: bool = False) -> Forward:
        """A layer's forward, after which rows that are at the beginning of a gap have crossed its bridge; `behind` the
        layer for exit heads of the full depth."""

        def run(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            output = forward(hidden_states, *args, **kwargs)
            states = output[0] if isinstance(output, tuple) else output
            for prompts, bridge in bridges:
                places = self._rows.places(prompts, states.device)
                states = with_rows(states, places, bridge(taken(states if behind else hidden_states, places)))
            return (states, *output[1:]) if isinstance(output, tuple) else states

        return run

    def _leaving_out(self, forward: Forward, wanted: Prompts) -> Forward:
        """A module's forward for all rows, with zeros for those of prompts that are not `wanted`."""
        rows = self._rows

        def run(hidden_states: torch.Tensor) -> torch.Tensor:
            output: torch.Tensor = forward(hidden_states)
            rest = tuple(prompt for prompt in rows.current if prompt not in wanted)
            by_row = output.reshape(rows.n_rows, -1)  # some blocks flatten rows and tokens
            return by_row.index_fill(0, rows.index(rest, output.device), 0.0).view_as(output)

        return run

    def _swapping(self, swap: Swap, shortened: Prompts) -> Forward:
        """A module's forward with its own weights for full rows and changed ones for the rows of shortened plans."""
        forward, rows = swap.module.forward, self._rows

        def run(hidden_states: torch.Tensor) -> torch.Tensor:
            inside = rows.both(shortened)
            if inside is rows.current:
                return swap.forward(hidden_states)  # type: ignore[no-any-return]
            output: torch.Tensor = forward(hidden_states)
            if not inside:
                return output
            places = rows.places(inside, output.device)
            own = taken(hidden_states.reshape(rows.n_rows, -1, hidden_states.shape[-1]), places)
            by_row = output.reshape(rows.n_rows, -1, output.shape[-1])
            return with_rows(by_row, places, taken(by_row, places) + swap.change(own)).view_as(output)

        return run

    def _fitting_cache(self) -> Forward:
        """The decoder's forward, at whose begin the pass is told its rows and the cache is fitted to the plans."""
        decoder: Any = decoder_of(self._model)
        forward, digest = decoder.forward, self._attached.digest if self._attached else ""
        holding = [self._of(lambda plan, i=index: i in plan.attention) for index in range(len(self._layers))]  # type: ignore[misc]
        rows_of: dict[int, list[tuple[int, ...]]] = {}
        names = argument_names(forward)

        def fit_cache(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = named_arguments(names, args, kwargs)
            given = (*args, kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
            n_rows = len(next(value for value in given if isinstance(value, torch.Tensor)))
            self._rows.begin(n_rows)
            cache, use_cache = kwargs.get("cache"), kwargs.get("use_cache")
            if cache is None and (decoder.config.use_cache if use_cache is None else use_cache):
                cache = kwargs["cache"] = DynamicCache(config=decoder.config)
            if cache is not None:
                if n_rows not in rows_of:
                    rows_of[n_rows] = [self._rows.rows(prompts) for prompts in holding]
                keep_rows(cache, rows_of[n_rows], n_rows)
                remember_plans(cache, tuple(self._plans), digest)
            return forward(*args, **kwargs)

        return fit_cache
