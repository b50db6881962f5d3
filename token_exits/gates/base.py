"""The contract of a gate: how sure is it that a token may leave here?

Shapes: `R` rows of the batch, `r` of them still in the layers, `D` hidden size, `K` tokens of the shortlist.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import cached_property

import torch

from token_exits.heads import ExitHeads


@dataclass(eq=False)
class Candidate:
    """The newest tokens of some rows at a layer before which they may leave.

    Attributes:
        depth: this layer; so many layers have run (or been left out by a plan).
        states: [r, D], before this layer.
        before: [r, D], before the last layer that ran.
        rows: places [r] among the R rows.
        n_rows: R.
        heads: take states to the model's output space.
        order: how many candidate layers these tokens have passed before.
        memory: what a gate noted about these tokens at earlier candidates, of all R rows; empty at the first one.
        last: the last layer's prediction [r], for gates that look ahead; None for all others.
    """

    depth: int
    states: torch.Tensor
    before: torch.Tensor
    rows: torch.Tensor
    n_rows: int
    heads: ExitHeads
    order: int = 0
    memory: dict[str, torch.Tensor] = field(default_factory=dict)
    last: torch.Tensor | None = None

    @cached_property
    def output(self) -> torch.Tensor:
        """[r, D], what goes to the model's final norm if the tokens leave."""
        return self.heads.output(self.depth, self.states)

    @cached_property
    def logits(self) -> torch.Tensor:
        """[r, K] over the shortlist, float32."""
        return self.heads.logits(self.output)

    @cached_property
    def top(self) -> torch.Tensor:
        """The likeliest of the shortlist [r], as places in it."""
        return self.logits.argmax(-1)


class Gate(ABC):
    """Looks at tokens at each candidate layer, shallowest first, and says how sure it is that they may leave there.

    The driver calls `confidence` once for each candidate layer and decoding step, with those rows alone that have not
    left; one gate may be asked by several threads. So it keeps nothing of a token but in `candidate.memory`. The token
    leaves where the confidence is at least the threshold. One threshold serves all layers, and the certificate moves
    it, so a confidence has to mean the same at every layer.

    What is said of one row must not depend on which other rows are asked about with it, but for rounding.

    Attributes:
        name: in reports and configurations.
        looks_ahead: the gate is told the last layer's prediction, which takes all layers: a yardstick that saves none.
    """

    name: str
    looks_ahead = False

    @abstractmethod
    def confidence(self, candidate: Candidate) -> torch.Tensor:
        """[r], in [0, 1], float32 on the states' device. NaN never leaves."""


class Constant(Gate):
    """Equally sure of every token: leaves always, or, below the threshold, never. For measuring."""

    name = "constant"

    def __init__(self, value: float) -> None:
        self.value = value

    def confidence(self, candidate: Candidate) -> torch.Tensor:
        return candidate.states.new_full((len(candidate.states),), self.value, dtype=torch.float32)
