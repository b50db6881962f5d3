"""Every gate keeps to the contract, and says what it should."""

import math

import pytest
import torch
from tiny import tiny_model

from token_exits.gates import (
    Candidate,
    Classifier,
    Constant,
    Entropy,
    Gate,
    Margin,
    Oracle,
    Patience,
    Saturation,
    TopProbability,
    fit_classifier,
    unit_states,
)
from token_exits.heads import ExitHeads
from token_exits.testing import GateConformance

MODEL = tiny_model("llama")
HEADS = ExitHeads(MODEL)
"""Checks the model, once for all heads of it: `GivenLogits` would not pass."""
WEIGHTS = torch.linspace(-1, 1, MODEL.config.hidden_size), 0.1
GATES = (
    *(TopProbability(), Margin(), Entropy(), Patience(), Saturation(), Oracle()),
    Classifier(dict.fromkeys(GateConformance.DEPTHS, WEIGHTS)),
)


def suite_of(gate: Gate) -> type[GateConformance]:
    parts = {"make": lambda self, heads: gate, "heads": lambda self: ExitHeads(MODEL, {}, torch.arange(3, 40))}
    return type(f"Test{type(gate).__name__}", (GateConformance,), parts)


for gate in GATES:
    globals()[f"Test{type(gate).__name__}"] = suite_of(gate)


class GivenLogits(ExitHeads):
    """Heads whose logits are the states themselves."""

    def __init__(self) -> None:
        super().__init__(MODEL)

    def logits(self, outputs: torch.Tensor) -> torch.Tensor:
        return outputs


def seen(states: torch.Tensor, before: torch.Tensor | None = None, **fields: object) -> Candidate:
    before = states if before is None else before
    return Candidate(2, states, before, torch.arange(len(states)), len(states), GivenLogits(), **fields)  # type: ignore[arg-type]


TWO_TOKENS = torch.tensor([[0.5, 0.25, 0.25], [1 / 3, 1 / 3, 1 / 3]]).log()
THREE_STATES = torch.tensor([[2.0, 0.0], [1.0, 1.0], [-1.0, 0.0]])
VALUES = [
    (TopProbability(), seen(TWO_TOKENS), [0.5, 1 / 3]),
    (Margin(), seen(TWO_TOKENS), [0.25, 0.0]),
    (Entropy(), seen(TWO_TOKENS), [1 - 1.5 * math.log(2) / math.log(3), 0.0]),
    (Saturation(), seen(THREE_STATES, torch.tensor([[1.0, 0.0]] * 3)), [1.0, math.sqrt(0.5), 0.0]),
    (Constant(0.25), seen(torch.zeros(3, 2)), [0.25] * 3),
]


@pytest.mark.parametrize(("gate", "candidate", "expected"), VALUES, ids=[type(row[0]).__name__ for row in VALUES])
def test_confidence_matches_hand_computed_values(gate, candidate, expected) -> None:
    torch.testing.assert_close(gate.confidence(candidate), torch.tensor(expected), atol=1e-6, rtol=1e-5)


def test_patience_counts_agreements_in_a_row() -> None:
    memory: dict[str, torch.Tensor] = {}
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    steps = [torch.stack([a, a]), torch.stack([a, b]), torch.stack([a, b]), torch.stack([b, b])]
    found = [Patience().confidence(seen(states, memory=memory)).tolist() for states in steps]
    assert found == [[0, 0], [0.5, 0], [pytest.approx(2 / 3), 0.5], [0, pytest.approx(2 / 3)]]


def test_classifier_learns_what_a_direction_says() -> None:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(400, 8, generator=generator) * 50
    agrees = unit_states(states)[:, 3] > 0.2
    gate = fit_classifier({2: states}, {2: agrees}, penalty=1e-3)
    found = gate.confidence(seen(states)) > 0.5
    assert (found == agrees).float().mean() > 0.95


def test_oracle_knows_the_last_prediction() -> None:
    states = torch.randn(4, MODEL.config.hidden_size, generator=torch.Generator().manual_seed(1))
    last = HEADS.predictions(states).clone()
    last[2] += 1
    candidate = Candidate(2, states, states, torch.arange(4), 4, HEADS, last=last)
    assert Oracle().confidence(candidate).tolist() == [1, 1, 0, 1]
