"""Gates that need no head: similarity of successive states, and a linear classifier.

Source: CALM, Schuster et al. 2022 (arXiv 2207.07061, section 3.5).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from token_exits.gates.base import Candidate, Gate


class Saturation(Gate):
    """How alike the state is to what it was before the last layer: their cosine, below 0 as 0."""

    name = "saturation"

    def confidence(self, candidate: Candidate) -> torch.Tensor:
        alike = torch.nn.functional.cosine_similarity(candidate.states.float(), candidate.before.float(), dim=-1)
        return alike.clamp(0.0, 1.0)


class Classifier(Gate):
    """The probability that the prediction here is the last layer's, by a logistic regression on the state.

    Args:
        weights: for each candidate layer its weights [D] for the state of mean square 1, and a constant.
    """

    name = "classifier"

    def __init__(self, weights: Mapping[int, tuple[torch.Tensor, float]]) -> None:
        self.weights = weights

    def confidence(self, candidate: Candidate) -> torch.Tensor:
        weights, constant = self.weights[candidate.depth]
        return (unit_states(candidate.states) @ weights.to(candidate.states.device) + constant).sigmoid()


def unit_states(states: torch.Tensor) -> torch.Tensor:
    """States [.., D] with a mean square of 1, float32."""
    wide = states.float()
    return wide * wide.pow(2).mean(-1, keepdim=True).clamp(min=1e-12).rsqrt()


def fit_classifier(
    states: Mapping[int, torch.Tensor], agrees: Mapping[int, torch.Tensor], penalty: float = 1e-2
) -> Classifier:
    """A logistic regression for each candidate layer, on tokens [T].

    Args:
        states: by candidate layer, [T, D].
        agrees: whether leaving there gives the last layer's prediction [T].
        penalty: of the mean square of the weights' effect; 1/2 |w|^2 times it is added to the mean loss.
    """
    return Classifier(
        {depth: _regression(unit_states(states[depth]), agrees[depth].float(), penalty) for depth in states}
    )


def _regression(inputs: torch.Tensor, targets: torch.Tensor, penalty: float) -> tuple[torch.Tensor, float]:
    weights = torch.zeros(inputs.shape[1] + 1, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        logits = inputs @ weights[:-1] + weights[-1]
        found = torch.nn.functional.binary_cross_entropy_with_logits(logits, targets)
        found = found + penalty / 2 * weights[:-1].pow(2).sum()
        found.backward()  # type: ignore[no-untyped-call]
        return found

    with torch.enable_grad():
        optimizer.step(loss)  # type: ignore[no-untyped-call]
    found = weights.detach()
    return found[:-1].clone(), float(found[-1])
