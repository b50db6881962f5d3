"""The newest token of every row on its way through the layers: who goes on, who has left where, and with what.

Shapes: `R` rows, `r` of them, `D` hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(eq=False)
class TokenPass:
    """One decoding step.

    Attributes:
        n_rows: R.
        step: place of the token in the answer, from 1.
        threshold: at which tokens leave.
        device: of the states.
        going: places of the rows that have not left, ascending.
        gone: places of the others, ascending.
        left: for each candidate layer at which rows left, their places and what goes to the final norm [r, D].
        before: states [R, 1, D] before the last layer that ran.
        memory: see `Candidate`.
        order: candidate layers passed.
        inputs: by layer what the model handed to it, for layers that are looked at later.
    """

    n_rows: int
    step: int
    threshold: float
    device: torch.device
    going: torch.Tensor = field(init=False)
    gone: torch.Tensor = field(init=False)
    left: list[tuple[int, torch.Tensor, torch.Tensor]] = field(default_factory=list)
    before: torch.Tensor | None = None
    memory: dict[str, torch.Tensor] = field(default_factory=dict)
    order: int = 0
    inputs: dict[int, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.going = torch.arange(self.n_rows, device=self.device)
        self.gone = self.going[:0]

    @property
    def all_go(self) -> bool:
        return len(self.going) == self.n_rows

    @property
    def none_goes(self) -> bool:
        return not len(self.going)

    def leave(self, depth: int, sure: torch.Tensor, outputs: torch.Tensor) -> None:
        """Those of the going rows that are `sure` [r] leave before layer `depth`; `outputs` [r, D] of all going."""
        rows = self.going[sure]
        self.left.append((depth, rows, outputs[sure]))
        self.gone = torch.cat([self.gone, rows]).sort().values
        self.going = self.going[~sure]

    def ended(self, states: torch.Tensor) -> torch.Tensor:
        """States [R, 1, D] after the last layer, with the outputs of rows that left in their places."""
        for _, rows, outputs in self.left:
            states = states.index_copy(0, rows, outputs[:, None].to(states.dtype))
        return states

    def depths(self, n_layers: int) -> torch.Tensor:
        """Before which layer each row left [R]; `n_layers` for those that did not."""
        found = torch.full((self.n_rows,), n_layers, device=self.device)
        for depth, rows, _ in self.left:
            found[rows] = depth
        return found


def of_rows(value: Any, rows: torch.Tensor, n_rows: int) -> Any:
    """A layer's argument with the tensors in it that hold R rows cut to some of them; one row for all stays."""
    if isinstance(value, (tuple, list)):
        return type(value)(of_rows(item, rows, n_rows) for item in value)
    if isinstance(value, torch.Tensor) and value.dim() > 1 and len(value) == n_rows and n_rows > 1:
        return value.index_select(0, rows)
    return value


def layers_below(layers: Sequence[int], n_layers: int) -> torch.Tensor:
    """How many of these layers lie before each depth [n_layers + 1]."""
    counts = torch.zeros(n_layers + 1, dtype=torch.long)
    counts[torch.tensor(sorted(layers)) + 1] = 1
    return counts.cumsum(0)
