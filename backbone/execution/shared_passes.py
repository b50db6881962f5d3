"""Passes under several plans, without a cache, that compute the layers plans have in common once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import torch
from torch import nn
from transformers import PreTrainedModel

from backbone.execution.apply_plan import apply_plan
from backbone.execution.live_changes import Forward, captured, replaced
from backbone.families import decoder_layers
from backbone.healing.healing import ReadyHealing
from backbone.plan import LayerPlan

Treatment = tuple[bool, bool, int, bool]
"""Of one layer under a plan: whether attention and MLP run, which bridge takes its place (0: none), whether its weights
are changed."""


def treatments(plan: LayerPlan, healing: ReadyHealing | None) -> list[Treatment]:
    """What a plan does with each layer of a model, with this healing."""
    healing = None if plan.is_full else healing
    bridges = {} if healing is None else healing.bridges.get(plan, {})
    changed = frozenset() if healing is None else healing.changed
    return [
        (i in plan.attention, i in plan.mlp, id(bridges[i]) if i in bridges else 0, i in changed)
        for i in range(plan.n_layers)
    ]


def common_depth(first: LayerPlan, second: LayerPlan, healing: ReadyHealing | None = None) -> int:
    """How many layers, counted from the first, both plans treat alike."""
    pairs = zip(treatments(first, healing), treatments(second, healing), strict=True)
    return next((depth for depth, (a, b) in enumerate(pairs) if a != b), first.n_layers)


def unchanged_depth(plans: Sequence[LayerPlan], healing: ReadyHealing | None) -> int:
    """How many layers, counted from the first, all plans run whole and with the model's own weights."""
    return min(common_depth(LayerPlan.full(plan.n_layers), plan, healing) for plan in plans)


def _starts(ordered: Sequence[LayerPlan], healing: ReadyHealing | None) -> list[int]:
    """The layer from which each plan's pass computes, where it goes on from the one before."""
    return [0] + [min(common_depth(a, b, healing), max(b.attention | b.mlp)) for a, b in pairwise(ordered)]


def sharing_order(plans: Sequence[LayerPlan], healing: ReadyHealing | None = None) -> list[LayerPlan]:
    """The plans in an order in which neighbours share the longest prefix; it depends on the plans alone."""
    numbers = {0: 0}  # of bridges, as the plans by their text have them
    keys = {
        plan: [
            (attention, mlp, numbers.setdefault(bridge, len(numbers)), changed)
            for attention, mlp, bridge, changed in treatments(plan, healing)
        ]
        for plan in sorted(plans, key=str)
    }
    return sorted(plans, key=keys.__getitem__)


class SharedPasses:
    """Runs one batch under several plans; each pass starts at the layer where its plan parts from the one before.

    Args:
        model: the model.
        plans: all plans that will be run, in the order in which they will be run; see `sharing_order`.
        healing: what shortened plans run with.

    Attributes:
        layers_run: layers computed so far (halves count half), over all passes.
    """

    def __init__(self, model: PreTrainedModel, plans: Sequence[LayerPlan], healing: ReadyHealing | None = None) -> None:
        self._model, self._plans, self._healing = model, list(plans), healing
        self._layers = decoder_layers(model)
        self._starts = _starts(plans, healing)
        self._states: dict[int, torch.Tensor] = {}
        self._next = 0
        self.layers_run = 0.0

    @contextmanager
    def next_plan(self) -> Iterator[LayerPlan]:
        """Within this block one call of the model, without a cache and with the same inputs, runs the next plan."""
        plan, start = self._plans[self._next], self._starts[self._next]
        later = self._starts[self._next + 1 :]
        self._next += 1
        known = {depth: state for depth, state in self._states.items() if depth <= start}
        with (
            apply_plan(self._model, plan, self._healing, first_layer=start),
            captured(self._layers, {depth for depth in later if depth > start}) as states,
            replaced(_given(self._layers[start], known[start]) if start else ()),
        ):
            yield plan
        self.layers_run += plan.from_layer(start).layers
        self._states = {depth: state for depth, state in {**known, **states}.items() if depth in later}


def _given(layer: nn.Module, state: torch.Tensor) -> Iterator[tuple[nn.Module, str, Forward]]:
    """Makes a layer compute from a known state."""
    forward = layer.forward
    yield layer, "forward", lambda hidden_states, *args, **kwargs: forward(state, *args, **kwargs)
