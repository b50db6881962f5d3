"""One pass for requests with different plans: each layer computes the rows of the requests whose plan runs it.

vLLM lays the tokens of all requests of a step one after the other; a request's rows are its tokens. Between layers it
carries two tensors whose sum is the state: what the last block added, and what was there before. Where the set of
requests changes, both are put back among the rows of everyone, and those of the requests that go on are taken out.

Shapes: `R` requests, `T` tokens of all of them, `D` hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from layerbudget import LayerPlan

Requests = tuple[int, ...]
"""Places of requests in the batch, ascending."""

Bridges = Mapping[LayerPlan, Mapping[int, Callable[[torch.Tensor], torch.Tensor]]]
"""For each plan the maps of states [t, D] that stand in for its gaps, by the first layer of the gap."""

AttentionContext = tuple[Any, Any]
"""Attention metadata and slot mapping of a set of requests, each a dictionary by layer name."""


class SubsetPass:
    """The rows of one pass.

    Args:
        plans: of the R requests; None runs every layer.
        starts: where the tokens of each request begin, and where those of the last end: int [R + 1], on the CPU.
        bridges: for each plan the maps that stand in for its gaps, by their first layer.
        context_of: what attention needs to know of a set of requests and its tokens [t].
        use: puts an `AttentionContext` in force; None the one of all requests.
    """

    def __init__(
        self,
        plans: Sequence[LayerPlan | None],
        starts: torch.Tensor,
        bridges: Bridges,
        context_of: Callable[[Requests, torch.Tensor], AttentionContext],
        use: Callable[[AttentionContext | None], None],
    ) -> None:
        self._plans, self._bridges, self._context_of, self._use = plans, bridges, context_of, use
        self._starts = starts.tolist()
        self._everyone = tuple(range(len(plans)))
        self._current = self._everyone
        self._tokens: dict[tuple[Requests, torch.device], torch.Tensor] = {}
        self._contexts: dict[Requests, AttentionContext] = {}
        self._positions: dict[Requests, torch.Tensor] = {}
        self._all: tuple[torch.Tensor, torch.Tensor] | None = None

    def running(self, layer: int) -> Requests:
        """The requests whose plan runs a layer."""
        return tuple(at for at in self._everyone if self._plans[at] is None or layer in self._plans[at].attention)

    def tokens(self, requests: Requests, device: torch.device) -> torch.Tensor:
        """Places of the rows of requests: int64 [t]."""
        key = (requests, device)
        if key not in self._tokens:
            places = [row for at in requests for row in range(self._starts[at], self._starts[at + 1])]
            self._tokens[key] = torch.tensor(places, dtype=torch.int64, device=device)
        return self._tokens[key]

    def through(
        self,
        layer: int,
        forward: Callable[..., Any],
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        residual: torch.Tensor | None,
        *,
        is_last: bool,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A layer's own `forward` over the rows that run it; the others pass by.

        Args:
            positions: of all tokens [T].
            hidden_states, residual: the two parts of the state of the current rows [t, D]; no residual before the first
                layer.
            is_last: no layer comes after this one, so that the rows of everyone are given back.
            kwargs: of the layer's own `forward`.
        """
        wanted = self.running(layer)
        if residual is None and wanted != self._everyone:
            hidden_states, residual = torch.zeros_like(hidden_states), hidden_states.clone()
        if wanted != self._current:
            assert residual is not None
            hidden_states, residual = self._everyones(hidden_states, residual)
            self._cross_bridges(layer, hidden_states, residual)
            if wanted:
                hidden_states, residual = self._taken(wanted, hidden_states, residual)
        if wanted:
            own = self._own_positions(positions)
            hidden_states, residual = forward(own, hidden_states, residual, **kwargs)
        assert residual is not None
        return self._everyones(hidden_states, residual) if is_last else (hidden_states, residual)

    def _everyones(self, hidden_states: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The states of all rows, the current ones among them."""
        if self._current == self._everyone:
            return hidden_states, residual
        assert self._all is not None
        places = self.tokens(self._current, hidden_states.device)
        for whole, part in zip(self._all, (hidden_states, residual), strict=True):
            whole.index_copy_(0, places, part)
        self._current = self._everyone
        self._use(None)
        return self._all

    def _taken(
        self, wanted: Requests, hidden_states: torch.Tensor, residual: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Out of the states of all rows those of some requests, which attention is told about."""
        if wanted == self._everyone:
            return hidden_states, residual
        places = self.tokens(wanted, hidden_states.device)
        if wanted not in self._contexts:
            self._contexts[wanted] = self._context_of(wanted, places)
        self._use(self._contexts[wanted])
        self._current, self._all = wanted, (hidden_states, residual)
        return hidden_states.index_select(0, places), residual.index_select(0, places)

    def _own_positions(self, positions: torch.Tensor) -> torch.Tensor:
        if self._current == self._everyone:
            return positions
        if self._current not in self._positions:
            places = self.tokens(self._current, positions.device)
            self._positions[self._current] = positions.index_select(0, places)
        return self._positions[self._current]

    def _cross_bridges(self, layer: int, hidden_states: torch.Tensor, residual: torch.Tensor) -> None:
        """Rows at the beginning of a gap cross its bridge; the whole new state is then in `residual`."""
        for plan in {plan for plan in self._plans if plan is not None}:
            bridge = self._bridges.get(plan, {}).get(layer)
            if bridge is not None:
                places = self.tokens(tuple(at for at in self._everyone if self._plans[at] == plan), residual.device)
                state = residual.index_select(0, places) + hidden_states.index_select(0, places)
                residual.index_copy_(0, places, bridge(state))
                hidden_states.index_fill_(0, places, 0)


@contextmanager
def subset_layers(layers: Mapping[int, nn.Module], rows: SubsetPass) -> Iterator[None]:
    """Within this block each of the model's layers computes the rows that run it.

    Args:
        layers: by number, in order. They are called as `layer(positions, hidden_states, residual, ...)`.
    """
    last = max(layers)

    def narrowed(index: int, stock: Callable[..., Any]) -> Callable[..., Any]:
        def forward(positions: Any, hidden_states: Any, residual: Any, **kwargs: Any) -> Any:
            return rows.through(index, stock, positions, hidden_states, residual, is_last=index == last, **kwargs)

        return forward

    for index, layer in layers.items():
        layer.__dict__["forward"] = narrowed(index, layer.forward)
    try:
        yield
    finally:
        for layer in layers.values():
            layer.__dict__.pop("forward", None)
