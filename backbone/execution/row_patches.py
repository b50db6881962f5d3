"""One pass for rows with different plans: each layer, or half of one, computes only the rows whose plan runs it.

The model's own code runs. Where only some rows run a module, its inputs are cut to these rows and what it returns is
put back among what the others have when it is skipped. Rows are told apart by the prompt that they belong to: a
prompt's beams or samples are neighbours and share its plan.

Shapes: `B` prompts, each in `c` neighbouring rows, `R = B * c` rows, `S` tokens, `D` hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from backbone.errors import InputError
from backbone.execution.cache import keep_rows, remember_plans
from backbone.execution.live_changes import replaced
from backbone.execution.plan_patches import (
    Forward,
    check_can_run,
    pass_on,
    pass_on_with_none,
    residual,
    residual_with_none,
    zeros,
    zeros_with_none,
)
from backbone.families import UnsupportedModelError, decoder_layers, decoder_of, family_of
from backbone.plan import LayerPlan
from backbone.stand_ins.attaching import Attached, Swap
from backbone.stand_ins.bridges import Bridge

Prompts = tuple[int, ...]
"""Some of the B prompts, ascending."""


class RowPlansError(InputError):
    """A pass over rows that the given plans do not fit."""


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
    layers = list(decoder_layers(model))
    for plan in plans:
        check_can_run(model, plan)
    if model.config._attn_implementation == "flex_attention":
        raise UnsupportedModelError("flex_attention has masks that cannot be cut into rows; load the model with sdpa")
    rows = _Rows(model, len(plans))
    forwards = [pair for index in range(len(layers)) for pair in _of_layer(model, index, plans, attached, rows)]
    if attached is not None:
        shortened = tuple(prompt for prompt, plan in enumerate(plans) if not plan.is_full)
        for swap in attached.swaps:
            forwards.append((swap.module, rows.swapping(swap, shortened)))
    forwards.append((decoder_of(model), _fitting_cache(decoder_of(model), plans, attached, rows)))
    # Every mixture of plans would be a graph of its own: mixed steps run uncompiled.
    uncompiled = (model, "get_compiled_call", lambda config: model.__call__)
    with replaced([*((module, "forward", forward) for module, forward in forwards), uncompiled]):
        yield


def _of_layer(
    model: PreTrainedModel, index: int, plans: Sequence[LayerPlan], attached: Attached | None, rows: _Rows
) -> Iterator[tuple[nn.Module, Forward]]:
    """What changes in one layer."""
    family, layer = family_of(model), decoder_layers(model)[index]
    attention = tuple(prompt for prompt, plan in enumerate(plans) if index in plan.attention)
    mlp = tuple(prompt for prompt, plan in enumerate(plans) if index in plan.mlp)
    either = tuple(sorted({*attention, *mlp}))
    skip = pass_on_with_none if family.returns_tuple else pass_on
    forward = rows.cutting(layer.forward, skip, either) if either else skip
    if bridges := _bridges_at(index, plans, attached):
        forward = rows.crossing(forward, bridges)
    if len(either) < len(plans):
        yield layer, forward
    if attention != either:
        block = getattr(layer, str(family.attention))
        yield (
            block,
            rows.cutting(block.forward, residual_with_none if family.adds_residual else zeros_with_none, attention),
        )
    if mlp != either and len(family.mlp) == 1:
        block = getattr(layer, family.mlp[0])
        yield block, rows.cutting(block.forward, residual if family.adds_residual else zeros, mlp)
    elif mlp != either:  # several modules, between which the states are no longer told apart: computed, and left out
        block = getattr(layer, family.mlp[-1])
        yield block, rows.leaving_out(block.forward, mlp)


def _bridges_at(index: int, plans: Sequence[LayerPlan], attached: Attached | None) -> list[tuple[Prompts, Bridge]]:
    """The bridges over gaps that begin with a layer, each with the prompts whose plan it belongs to."""
    if attached is None:
        return []
    found = {plan: attached.bridges.get(plan, {}).get(index) for plan in plans}
    return [
        (tuple(prompt for prompt, own in enumerate(plans) if own == plan), bridge)
        for plan, bridge in found.items()
        if bridge is not None
    ]


_STATES = ("hidden_states", "residual")
"""What differs from layer to layer; where it has no name it is the first or second argument."""


class _Rows:
    """Which rows a pass has, and which of them its states hold at the moment."""

    def __init__(self, model: PreTrainedModel, n_prompts: int) -> None:
        text = model.config.get_text_config()
        self._heads, self._n_prompts = int(text.num_attention_heads), n_prompts
        self._current: Prompts = tuple(range(n_prompts))
        self._copies = 1
        self._indices: dict[tuple[Prompts, Prompts, int, torch.device], torch.Tensor] = {}
        self._cuts: dict[tuple[int, Prompts, Prompts], tuple[torch.Tensor, torch.Tensor]] = {}

    def begin(self, n_rows: int) -> None:
        """A pass over R rows begins.

        Raises:
            RowPlansError: R is no multiple of B.
        """
        copies, rest = divmod(n_rows, self._n_prompts)
        if rest or not copies:
            raise RowPlansError(
                f"this pass has {n_rows} rows, but plans were given for {self._n_prompts} prompts; give a plan for "
                "each row, or for each prompt whose rows (beams, samples) are neighbours"
            )
        self._copies, self._current = copies, tuple(range(self._n_prompts))
        self._cuts.clear()

    def cutting(self, forward: Forward, skip: Forward, wanted: Prompts) -> Forward:
        """A module's forward for the rows of the prompts `wanted` alone; the others have what `skip` gives."""

        def run(*args: Any, **kwargs: Any) -> Any:
            outer, inside = self._current, self._both(wanted)
            if inside == outer:
                return forward(*args, **kwargs)
            others = skip(*args, **kwargs)
            if not inside:
                return others
            cut_args = [self._cut(value, inside, keep=place > 1) for place, value in enumerate(args)]
            cut_kwargs = {name: self._cut(value, inside, keep=name not in _STATES) for name, value in kwargs.items()}
            self._current = inside
            try:
                own = forward(*cut_args, **cut_kwargs)
            finally:
                self._current = outer
            return self._put(others, own, inside)

        return run

    def crossing(self, forward: Forward, bridges: Sequence[tuple[Prompts, Bridge]]) -> Forward:
        """A layer's forward, after which rows that are at the beginning of a gap have crossed its bridge."""

        def run(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            output = forward(hidden_states, *args, **kwargs)
            states = output[0] if isinstance(output, tuple) else output
            for prompts, bridge in bridges:
                index = self._index(prompts, states.device)
                states = states.index_copy(0, index, bridge(hidden_states.index_select(0, index)))
            return (states, *output[1:]) if isinstance(output, tuple) else states

        return run

    def leaving_out(self, forward: Forward, wanted: Prompts) -> Forward:
        """A module's forward for all rows, with zeros for those of prompts that are not `wanted`."""

        def run(hidden_states: torch.Tensor) -> torch.Tensor:
            output: torch.Tensor = forward(hidden_states)
            rest = tuple(prompt for prompt in self._current if prompt not in wanted)
            rows = output.reshape(len(self._current) * self._copies, -1)  # some blocks flatten rows and tokens
            return rows.index_fill(0, self._index(rest, output.device), 0.0).view_as(output)

        return run

    def swapping(self, swap: Swap, shortened: Prompts) -> Forward:
        """A module's forward with its own weights for full rows and changed ones for the rows of shortened plans."""
        forward = swap.module.forward

        def run(hidden_states: torch.Tensor) -> torch.Tensor:
            inside = self._both(shortened)
            if inside == self._current:
                return swap.forward(hidden_states)  # type: ignore[no-any-return]
            output: torch.Tensor = forward(hidden_states)
            if not inside:
                return output
            index, n_rows = self._index(inside, output.device), len(self._current) * self._copies
            rows = hidden_states.reshape(n_rows, -1, hidden_states.shape[-1]).index_select(0, index)
            by_row = output.reshape(n_rows, -1, output.shape[-1])
            return by_row.index_add(0, index, swap.change(rows)).view_as(output)

        return run

    def rows_of(self, prompts: Prompts, device: torch.device) -> torch.Tensor:
        """The places of the prompts' rows among all R."""
        return self._index(prompts, device, tuple(range(self._n_prompts)))

    def _both(self, wanted: Prompts) -> Prompts:
        return tuple(prompt for prompt in self._current if prompt in wanted)

    def _index(self, prompts: Prompts, device: torch.device, among: Prompts | None = None) -> torch.Tensor:
        """The places of the prompts' rows among those that the states hold."""
        key = (prompts, self._current if among is None else among, self._copies, device)
        if key not in self._indices:
            places = {prompt: place for place, prompt in enumerate(key[1])}
            rows = [places[prompt] * self._copies + copy for prompt in prompts for copy in range(self._copies)]
            self._indices[key] = torch.tensor(rows, dtype=torch.long, device=device)
        return self._indices[key]

    def _cut(self, value: Any, inside: Prompts, *, keep: bool) -> Any:
        """A value with each tensor in it that holds the current rows cut to some of them.

        Args:
            keep: for masks and position embeddings, which come to every layer of a pass and are cut once.
        """
        if isinstance(value, (tuple, list)):
            return type(value)(self._cut(item, inside, keep=keep) for item in value)
        n_rows = len(self._current) * self._copies
        if not isinstance(value, torch.Tensor) or value.dim() < 2:
            return value
        if len(value) not in (n_rows, n_rows * self._heads):
            return value
        key = (id(value), self._current, inside)
        if key in self._cuts:
            return self._cuts[key][1]
        by_row = value.reshape(n_rows, -1, *value.shape[1:])  # some masks have rows and heads in one dimension
        cut = by_row.index_select(0, self._index(inside, value.device)).flatten(0, 1)
        if keep:
            self._cuts[key] = (value, cut)  # with the tensor itself, so that its id stays its own
        return cut

    def _put(self, others: Any, own: Any, inside: Prompts) -> Any:
        if isinstance(others, tuple):
            return (self._put(others[0], own[0], inside), *own[1:])
        return others.index_copy(0, self._index(inside, others.device), own)


def _fitting_cache(decoder: Any, plans: Sequence[LayerPlan], attached: Attached | None, rows: _Rows) -> Forward:
    """The decoder's forward, at whose begin the pass is told its rows and the cache is fitted to the plans."""
    forward, n_layers = decoder.forward, plans[0].n_layers
    digest = attached.digest if attached else ""
    prompts = [tuple(p for p, plan in enumerate(plans) if index in plan.attention) for index in range(n_layers)]

    def fit_cache(*args: Any, **kwargs: Any) -> Any:
        given = (*args, kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
        n_rows = len(next(value for value in given if isinstance(value, torch.Tensor)))
        rows.begin(n_rows)
        cache, use_cache = kwargs.get("cache"), kwargs.get("use_cache")
        if cache is None and (decoder.config.use_cache if use_cache is None else use_cache):
            cache = kwargs["cache"] = DynamicCache(config=decoder.config)
        if cache is not None:
            kept = [None if len(p) == len(plans) else rows.rows_of(p, torch.device("cpu")) for p in prompts]
            keep_rows(cache, kept, n_rows)
            remember_plans(cache, tuple(plans), digest)
        return forward(*args, **kwargs)

    return fit_cache
