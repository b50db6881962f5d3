"""Share what plans have in common: a pass under one plan goes on from the states of another, up to where they part.

Only for passes without a cache, such as scoring a given text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from backbone.families import decoder_layers
from backbone.plan import LayerPlan
from backbone.running import apply_plan


def common_depth(first: LayerPlan, second: LayerPlan) -> int:
    """How many layers, counted from the first, both plans treat alike."""
    different = (first.attention ^ second.attention) | (first.mlp ^ second.mlp)
    return min(different, default=first.n_layers)


def sharing_order(plans: Sequence[LayerPlan]) -> list[LayerPlan]:
    """The plans ordered so that each has as much as any earlier one in common with the one just before it."""
    return sorted(plans, key=lambda plan: [(i in plan.attention, i in plan.mlp) for i in range(plan.n_layers)])


class SharedPasses:
    """Runs one batch under several plans; each pass starts at the layer where its plan parts from the one before.

    Args:
        model: the model.
        plans: all plans that will be run, in the order in which they will be run; see `sharing_order`.

    Attributes:
        layers_run: layers computed so far (halves count half), over all passes.
    """

    def __init__(self, model: PreTrainedModel, plans: Sequence[LayerPlan]) -> None:
        self._model, self._plans = model, list(plans)
        self._layers = decoder_layers(model)
        self._starts = [0] + [min(common_depth(a, b), max(b.attention | b.mlp)) for a, b in pairwise(plans)]
        self._states: dict[int, torch.Tensor] = {}
        self._next = 0
        self.layers_run = 0.0

    @contextmanager
    def next_plan(self) -> Iterator[LayerPlan]:
        """Within this block one call of the model, without a cache and with the same inputs as always, runs the next
        plan. The states from which later plans go on are kept."""
        plan, start = self._plans[self._next], self._starts[self._next]
        later = self._starts[self._next + 1 :]
        self._next += 1
        states = {depth: state for depth, state in self._states.items() if depth <= start}
        rest = plan if start == 0 else plan.from_layer(start)
        with apply_plan(self._model, rest), ExitStack() as undo:
            if start:
                undo.callback(self._layers[start].register_forward_pre_hook(_giving(states[start])).remove)
            for depth in {depth for depth in later if depth > start}:
                hook = self._layers[depth].register_forward_pre_hook(_keeping(states, depth), with_kwargs=True)
                undo.callback(hook.remove)
            yield plan
        self.layers_run += rest.layers
        self._states = {depth: state for depth, state in states.items() if depth in later}


def _giving(state: torch.Tensor) -> Any:
    def give(layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (state, *args[1:])

    return give


def _keeping(states: dict[int, torch.Tensor], depth: int) -> Any:
    def keep(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states[depth] = args[0]

    return keep
