"""One decode step, in which rows exit at different layers.

Shapes: `R` rows of the batch, `r` some of these rows, `D` hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from backbone.execution.rows import cut, with_rows


@dataclass(eq=False)
class TokenStep:
    """The rows of one decode step.

    Attributes:
        n_rows: R.
        step: number of the new token within the answer, from 1.
        threshold: confidence from which on a row exits.
        device: where the states lie.
        active: indices of the rows that have not exited, ascending.
        exited: indices of the rows that have exited, ascending.
        exits: for each exit: the layer, the indices of its rows [r], and their inputs to the final norm [r, D].
        before: states [R, 1, D] before the last layer that ran.
        memory: notes of the gate, see `Candidate.memory`.
        inputs: keyword arguments of each layer, by layer, for gates that look ahead.
    """

    n_rows: int
    step: int
    threshold: float
    device: torch.device
    active: torch.Tensor = field(init=False)
    exited: torch.Tensor = field(init=False)
    exits: list[tuple[int, torch.Tensor, torch.Tensor]] = field(default_factory=list)
    before: torch.Tensor | None = None
    memory: dict[str, torch.Tensor] = field(default_factory=dict)
    inputs: dict[int, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.active = torch.arange(self.n_rows, device=self.device)
        self.exited = self.active[:0]

    @property
    def all_active(self) -> bool:
        return len(self.active) == self.n_rows

    @property
    def none_active(self) -> bool:
        return not len(self.active)

    def exit(self, depth: int, leaves: torch.Tensor, outputs: torch.Tensor) -> None:
        """Let some active rows exit.

        Args:
            depth: the layer before which they exit.
            leaves: which of the r active rows exit [r].
            outputs: inputs to the final norm of all active rows [r, D].
        """
        rows = self.active[leaves]
        self.exits.append((depth, rows, outputs[leaves]))
        self.exited = torch.cat([self.exited, rows]).sort().values
        self.active = self.active[~leaves]

    def with_exits(self, states: torch.Tensor) -> torch.Tensor:
        """Final states [R, 1, D], with the outputs of `exit` for rows that exited."""
        for _, rows, outputs in self.exits:
            states = with_rows(states, rows, outputs[:, None].to(states.dtype))
        return states

    def depths(self, n_layers: int) -> list[int]:
        """Layer before which each row exited [R]; `n_layers` for rows that ran all layers."""
        depths = [n_layers] * self.n_rows
        for depth, rows, _ in self.exits:
            for row in rows.tolist():
                depths[row] = depth
        return depths

    def cut(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """A layer's arguments with each tensor that holds R rows cut to the active ones."""
        return {name: cut(value, self.n_rows, lambda _: self.active) for name, value in arguments.items()}
