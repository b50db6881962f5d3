"""The conformance suite of gates: inherit `GateConformance`, override `make`, and pytest finds the tests."""

from __future__ import annotations

import copy

import torch

from token_exits.gates import Candidate, Gate
from token_exits.heads import ExitHeads


class GateConformance:
    """The contract of `Gate`, for tokens of six rows at two candidate layers of any small model."""

    DEPTHS = (2, 4)
    N_ROWS = 6

    def make(self, heads: ExitHeads) -> Gate:
        """A new gate that knows the candidate layers `DEPTHS` of the heads' model."""
        raise NotImplementedError

    def heads(self) -> ExitHeads:
        """Exit heads of a small model with at least five layers."""
        raise NotImplementedError

    def test_confidence_is_a_share_for_each_row(self) -> None:
        gate = self.make(heads := self.heads())
        for candidate in self._candidates(heads):
            confidence = gate.confidence(candidate)
            assert confidence.shape == (self.N_ROWS,)
            assert confidence.dtype == torch.float32
            assert ((confidence >= 0) & (confidence <= 1)).all()

    def test_rows_do_not_depend_on_one_another(self) -> None:
        gate, rows = self.make(heads := self.heads()), torch.tensor([1, 4])
        for all_rows, some in zip(self._candidates(heads), self._candidates(heads, rows), strict=True):
            torch.testing.assert_close(gate.confidence(all_rows)[rows], gate.confidence(some), atol=1e-5, rtol=1e-4)

    def test_rows_that_left_between_do_not_matter(self) -> None:
        gate, rows = self.make(heads := self.heads()), torch.tensor([0, 2, 5])
        whole = [gate.confidence(candidate) for candidate in self._candidates(heads)]
        first, second = self._candidates(heads)
        gate.confidence(first)
        picked = self._candidates(heads, rows)[1]
        picked.memory = second.memory
        torch.testing.assert_close(gate.confidence(picked), whole[1][rows], atol=1e-5, rtol=1e-4)

    def test_the_gate_keeps_nothing_of_a_token(self) -> None:
        gate = self.make(heads := self.heads())
        before = repr(copy.deepcopy(vars(gate)))
        first, again = ([gate.confidence(one) for one in self._candidates(heads)] for _ in range(2))
        assert repr(vars(gate)) == before
        assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))

    def test_nan_states_do_not_leave(self) -> None:
        gate = self.make(heads := self.heads())
        for candidate in self._candidates(heads, value=torch.nan):
            assert gate.looks_ahead or not (gate.confidence(candidate) > 0).any()

    def _candidates(
        self, heads: ExitHeads, rows: torch.Tensor | None = None, value: float | None = None
    ) -> tuple[Candidate, Candidate]:
        """The same tokens at both candidate layers, of all rows or of some."""
        picked = torch.arange(self.N_ROWS) if rows is None else rows
        states = torch.randn(3, self.N_ROWS, heads.model.config.hidden_size, generator=torch.Generator().manual_seed(0))
        if value is not None:
            states.fill_(value)
        memory: dict[str, torch.Tensor] = {}
        states = states[:, picked]
        last, before = heads.predictions(states[2]), states[0] * 0.5 + 0.1
        first, second = (
            Candidate(depth, own, before, picked, self.N_ROWS, heads, memory, last)
            for depth, own in zip(self.DEPTHS, states, strict=False)
        )
        return first, second
