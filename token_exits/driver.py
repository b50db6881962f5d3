"""Rows leave the layers token by token: the model's own code and decoding loop run, a layer only for rows that go on.

The prompt, which is the first pass of a loop, runs in full. In every later pass the newest token of each row comes to
the candidate layers, where the gate looks at it. What remains of a layer for rows that have left is what the strategy
says about keys and values.

Shapes: `R` rows, `r` of them, `D` hidden size, `L` layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from backbone.execution.live_changes import Forward, replaced
from backbone.families import decoder_layers, decoder_of
from backbone.plan import LayerPlan
from token_exits.filling import Filling
from token_exits.gates.base import Candidate
from token_exits.row_cache import SomeRows
from token_exits.settings import ExitSettings
from token_exits.token_pass import TokenPass, layers_below, of_rows
from token_exits.unfinished import Unfinished


@contextmanager
def exiting(model: PreTrainedModel, settings: ExitSettings, plan: LayerPlan, steps: int) -> Iterator[Driver]:
    """Within this block and thread one decoding loop of `model` lets tokens leave. To be used inside `apply_plan`.

    Args:
        model: on whose `generate()` the loop runs.
        settings: how tokens leave.
        plan: under which the model runs; tokens leave below it.
        steps: the longest answer in tokens, for a decaying threshold.
    """
    driver = Driver(model, settings, plan, steps)
    with replaced((module, "forward", forward) for module, forward in driver.forwards()):
        yield driver


class Driver:
    """One decoding loop.

    Attributes:
        layers_run: for each pass how many layers each row ran [R].
    """

    def __init__(self, model: PreTrainedModel, settings: ExitSettings, plan: LayerPlan, steps: int) -> None:
        self._model, self._settings, self._plan, self._steps = model, settings, plan, steps
        self._layers = list(decoder_layers(model))
        running = plan.attention | plan.mlp
        # Inside a gap, and before one, a state has not changed since the layer before: no candidate of its own.
        self._depths = frozenset(depth for depth in settings.depths if depth in running)
        self._counts = layers_below(sorted(running), len(self._layers))
        self._filling = Filling(model, settings.strategy, plan)
        self._unfinished = Unfinished() if settings.strategy == "recompute" else None
        self._token: TokenPass | None = None
        self._seen: list[tuple[int, torch.Tensor, torch.Tensor]] = []
        self.layers_run: list[torch.Tensor] = []

    def forwards(self) -> Iterator[tuple[nn.Module, Forward]]:
        """What changes in the model: its decoder's forward, and each layer's."""
        decoder = decoder_of(self._model)
        yield decoder, self._beginning(decoder.forward)
        for index, layer in enumerate(self._layers):
            yield layer, self._of_layer(index, layer.forward)

    def _beginning(self, forward: Forward) -> Forward:
        def run(*args: Any, **kwargs: Any) -> Any:
            ids: torch.Tensor = args[0] if args else kwargs["input_ids"]
            step = len(self.layers_run)
            self._token = None
            if step and ids.shape[1] == 1:
                threshold = self._settings.threshold_at(step, self._steps)
                self._token = TokenPass(len(ids), step, threshold, ids.device)
                if self._unfinished is not None:
                    self._unfinished.begin(self._token, kwargs["cache"].get_seq_length())
            output = forward(*args, **kwargs)
            n_layers = len(self._layers)
            depths = torch.full((len(ids),), n_layers) if self._token is None else self._token.depths(n_layers).cpu()
            self.layers_run.append(self._counts[depths])
            self._token = None
            return output

        return run

    def _of_layer(self, index: int, forward: Forward) -> Forward:
        is_last, is_candidate = index == len(self._layers) - 1, index in self._depths
        runs = index in self._plan.attention or index in self._plan.mlp

        def run(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            token = self._token
            if token is None:
                return forward(hidden_states, *args, **kwargs)
            if is_candidate and not token.none_goes:
                self._look(token, index, hidden_states)
            output = self._run(token, index, forward, hidden_states, kwargs)
            if runs:
                token.before = hidden_states
            if not is_last:
                return output
            if self._settings.gate.looks_ahead:
                self._look_back(token, output, kwargs["cache"])
            if self._unfinished is not None:
                self._unfinished.end(token)
            return token.ended(output)

        return run

    def _look(self, token: TokenPass, depth: int, states: torch.Tensor) -> None:
        """The gate looks at the rows that have come so far; those that are sure leave."""
        assert token.before is not None, "layer 0 is no candidate"
        if self._settings.gate.looks_ahead:
            self._seen.append((depth, states, token.before))
            return
        candidate = self._candidate(token, depth, states, token.before)
        sure = self._settings.gate.confidence(candidate) >= token.threshold
        if self._unfinished is not None:
            sure = self._unfinished.allowed(token.going, sure)
        if sure.any():
            if self._unfinished is not None:
                self._unfinished.leave(token, depth, token.going[sure], states)
            token.leave(depth, sure, candidate.output)
        if self._unfinished is not None:
            self._unfinished.take_along(token, depth)

    def _candidate(
        self, token: TokenPass, depth: int, states: torch.Tensor, before: torch.Tensor, last: torch.Tensor | None = None
    ) -> Candidate:
        own, own_before = (t[:, 0] if token.all_go else t[:, 0][token.going] for t in (states, before))
        token.order += 1
        return Candidate(
            depth,
            own,
            own_before,
            token.going,
            token.n_rows,
            self._settings.heads,
            token.order - 1,
            token.memory,
            None if last is None else last[token.going],
        )

    def _run(
        self, token: TokenPass, index: int, forward: Forward, states: torch.Tensor, kwargs: dict[str, Any]
    ) -> torch.Tensor:
        """One layer for the rows that go on; the others keep their states [R, 1, D]."""
        if self._settings.gate.looks_ahead:
            token.inputs[index] = kwargs
        keeps_cache = index in self._plan.attention
        if self._unfinished is not None:
            return self._unfinished.run(token, index, forward, states, kwargs)
        if token.all_go:
            return forward(states, **kwargs)  # type: ignore[no-any-return]
        if token.none_goes:
            if keeps_cache:
                self._filling.fill(token.gone, index, states, kwargs)
            return states
        own = {name: of_rows(value, token.going, token.n_rows) for name, value in kwargs.items()}
        if keeps_cache:
            others = self._filling.of_rows(token.gone, index, states, kwargs)
            own["cache"] = SomeRows(kwargs["cache"], token.going, (token.gone, others))
        return states.index_copy(0, token.going, forward(states.index_select(0, token.going), **own))

    def _look_back(self, token: TokenPass, output: torch.Tensor, cache: Any) -> None:
        """For a gate that looks ahead: all layers have run, and now rows leave where they would have left; what later
        layers keep of them is put in the place of what they computed."""
        last = self._settings.heads.predictions(output[:, 0])
        for depth, states, before in self._seen:
            if token.none_goes:
                break
            candidate = self._candidate(token, depth, states, before, last)
            sure = self._settings.gate.confidence(candidate) >= token.threshold
            if not sure.any():
                continue
            rows = token.going[sure]
            token.leave(depth, sure, candidate.output)
            for index in sorted(self._plan.attention - frozenset(range(depth))):
                keys, values = self._filling.of_rows(rows, index, states, token.inputs[index])
                cache.layers[index].keys[rows, :, -1:] = keys
                cache.layers[index].values[rows, :, -1:] = values
        self._seen.clear()
