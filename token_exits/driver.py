"""The driver of token exits, inside the model's own code and decoding loop.

The prompt, the first pass of a loop, runs in full. In every later pass the gate sees the newest token of each active
row at the candidate layers.

Shapes: `R` rows, `r` of them, `D` hidden size, `L` layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from backbone.execution.live_changes import Forward, replaced
from backbone.families import decoder_layers
from backbone.plan import LayerPlan
from token_exits.gates import Candidate
from token_exits.kv_strategies import DeferredKV, KVStrategy, PropagatedKV
from token_exits.settings import ExitSettings
from token_exits.token_step import TokenStep


@contextmanager
def token_exits(model: PreTrainedModel, settings: ExitSettings, plan: LayerPlan, steps: int) -> Iterator[Driver]:
    """Let tokens leave in one decoding loop, within this block and thread.

    To be used inside `apply_plan`.

    Args:
        model: its `generate()` runs the loop.
        settings: gate, threshold, candidate layers.
        plan: under which the model runs; tokens leave below it.
        steps: longest answer in tokens, for a decaying threshold.
    """
    driver = Driver(model, settings, plan, steps)
    with replaced((module, "forward", forward) for module, forward in driver.forwards()):
        yield driver


class Driver:
    """One decoding loop.

    Attributes:
        layers_run: for each pass the number of layers that each of the R rows ran.
    """

    def __init__(self, model: PreTrainedModel, settings: ExitSettings, plan: LayerPlan, steps: int) -> None:
        self._model, self._settings, self._plan, self._steps = model, settings, plan, steps
        self._layers = list(decoder_layers(model))
        self._running = plan.attention | plan.mlp
        # Inside a gap, and before one, a state has not changed since the layer before: no candidate.
        self._depths = frozenset(depth for depth in settings.depths if depth in self._running)
        self._counts = [sum(i < depth for i in self._running) for depth in range(len(self._layers) + 1)]
        self._kv: KVStrategy = (
            DeferredKV()
            if settings.strategy == "recompute"
            else PropagatedKV(model, plan, shares=settings.strategy == "share")
        )
        self._token: TokenStep | None = None
        self._observed: list[tuple[int, torch.Tensor, torch.Tensor]] = []
        self.layers_run: list[list[int]] = []

    def forwards(self) -> Iterator[tuple[nn.Module, Forward]]:
        """Each layer with the forward that takes the place of its own."""
        for index, layer in enumerate(self._layers):
            yield layer, self._layer_forward(index, layer.forward)

    def _layer_forward(self, index: int, forward: Forward) -> Forward:
        is_last, is_candidate = index == len(self._layers) - 1, index in self._depths
        looks_ahead = self._settings.gate.looks_ahead

        def run(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if index == 0:
                self._begin(hidden_states, kwargs)
            token = self._token
            if token is None:
                return forward(hidden_states, *args, **kwargs)
            if is_candidate and not token.none_active:
                self._decide(token, index, hidden_states)
            if looks_ahead:
                token.inputs[index] = kwargs
            output = self._kv.run(token, index, forward, hidden_states, kwargs)
            if index in self._running:
                token.before = hidden_states
            return self._end(token, output, kwargs) if is_last else output

        return run

    def _begin(self, states: torch.Tensor, kwargs: Mapping[str, Any]) -> None:
        """A pass begins: states [R, S, D] and the arguments of layer 0."""
        step, self._token = len(self.layers_run), None
        self.layers_run.append([self._counts[-1]] * len(states))
        if step and states.shape[1] == 1:
            self._token = TokenStep(len(states), step, self._settings.threshold_at(step, self._steps), states.device)
            self._kv.begin(self._token, kwargs["cache"])

    def _end(self, token: TokenStep, states: torch.Tensor, kwargs: Mapping[str, Any]) -> torch.Tensor:
        """The last layer has run: final states [R, 1, D] from its output and arguments."""
        if self._settings.gate.looks_ahead:
            self._decide_afterwards(token, states, kwargs["cache"])
        self._kv.end()
        self.layers_run[-1] = [self._counts[depth] for depth in token.depths(len(self._layers))]
        return token.with_exits(states)

    def _decide(self, token: TokenStep, depth: int, states: torch.Tensor) -> None:
        """Ask the gate about the active rows; the confident ones leave."""
        assert token.before is not None, "layer 0 is no candidate"
        if self._settings.gate.looks_ahead:
            self._observed.append((depth, states, token.before))
            return
        candidate = self._candidate(token, depth, states, token.before)
        leaves = self._kv.may_exit(token, self._settings.gate.confidence(candidate) >= token.threshold)
        if leaves.any():
            self._kv.exit(token, depth, token.active[leaves], states)
            token.exit(depth, leaves, candidate.output)
        self._kv.resume(token, depth)

    def _candidate(
        self, token: TokenStep, depth: int, states: torch.Tensor, before: torch.Tensor, last: torch.Tensor | None = None
    ) -> Candidate:
        own, own_before = (t[:, 0] if token.all_active else t[:, 0][token.active] for t in (states, before))
        own_last = None if last is None else last[token.active]
        heads = self._settings.heads
        return Candidate(depth, own, own_before, token.active, token.n_rows, heads, token.memory, own_last)

    def _decide_afterwards(self, token: TokenStep, output: torch.Tensor, cache: Any) -> None:
        """For a gate that looks ahead: replace what layers stored of rows that leave."""
        assert isinstance(self._kv, PropagatedKV), "`ExitSettings` refuses such gates with `recompute`"
        last = self._settings.heads.predictions(output[:, 0])
        for depth, states, before in self._observed:
            if token.none_active:
                break
            candidate = self._candidate(token, depth, states, before, last)
            leaves = self._settings.gate.confidence(candidate) >= token.threshold
            if not leaves.any():
                continue
            rows = token.active[leaves]
            token.exit(depth, leaves, candidate.output)
            for index in sorted(self._plan.attention - frozenset(range(depth))):
                keys, values = self._kv.keys_values(rows, index, states, token.inputs[index])
                cache.layers[index].keys[rows, :, -1:] = keys
                cache.layers[index].values[rows, :, -1:] = values
        self._observed.clear()
