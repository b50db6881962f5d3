"""Gates: how confident is the model that a token may leave before a layer?

Sources: CALM, Schuster et al. 2022 (arXiv 2207.07061, section 3.5): softmax response (the margin), saturation,
classifier. Entropy: BranchyNet, Teerapittayanon et al. 2016, and Valade 2024 (arXiv 2407.21082). Patience: PABEE, Zhou
et al. 2020 (arXiv 2006.04152). Oracle: Shan et al. 2024 (arXiv 2412.01455).

Shapes: `R` rows of the batch, `r` of them active, `D` hidden size, `K` tokens of the shortlist, `T` tokens.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch

from token_exits.heads import ExitHeads


@dataclass(eq=False)
class Candidate:
    """The newest tokens of the active rows, before a layer where they may leave.

    Attributes:
        depth: that layer.
        states: [r, D], before it.
        before: [r, D], before the last layer that ran.
        rows: places [r] among the R rows.
        n_rows: R.
        heads: map states to logits.
        memory: a gate's notes on these tokens at earlier candidates, for all R rows; empty at the first one.
        last: the last layer's prediction [r], for gates that look ahead; None for the others.
    """

    depth: int
    states: torch.Tensor
    before: torch.Tensor
    rows: torch.Tensor
    n_rows: int
    heads: ExitHeads
    memory: dict[str, torch.Tensor] = field(default_factory=dict)
    last: torch.Tensor | None = None

    @cached_property
    def output(self) -> torch.Tensor:
        """Input [r, D] of the final norm if the tokens leave."""
        return self.heads.output(self.depth, self.states)

    @cached_property
    def logits(self) -> torch.Tensor:
        """[r, K] over the shortlist, float32."""
        return self.heads.logits(self.output)


class Gate(ABC):
    """Gives the confidence that tokens may leave, at each candidate layer, shallowest first.

    The driver calls `confidence` once for each candidate layer and decode step, with the active rows only. Several
    threads may share a gate, so notes on tokens go into `candidate.memory`. A token leaves where the confidence is at
    least the threshold. One threshold serves all layers, so a confidence must mean the same at each of them. A row's
    confidence must not depend on the other rows, except for rounding.

    Attributes:
        name: in reports and configurations.
        looks_ahead: the gate needs the last layer's prediction, hence every layer: a yardstick that saves nothing.
    """

    name: str
    looks_ahead = False

    @abstractmethod
    def confidence(self, candidate: Candidate) -> torch.Tensor:
        """[r], in [0, 1], float32 on the states' device. NaN never leaves."""


class Constant(Gate):
    """The same confidence for every token, for measurements."""

    name = "constant"

    def __init__(self, value: float) -> None:
        self.value = value

    def confidence(self, candidate: Candidate) -> torch.Tensor:
        return candidate.states.new_full((len(candidate.states),), self.value, dtype=torch.float32)


class Oracle(Gate):
    """1 where leaving gives the last layer's prediction, over the whole vocabulary, else 0."""

    name = "oracle"
    looks_ahead = True

    def confidence(self, candidate: Candidate) -> torch.Tensor:
        assert candidate.last is not None, "the driver gives the last prediction to gates that look ahead"
        return (candidate.heads.predictions(candidate.output) == candidate.last).float()


class TopProbability(Gate):
    """Logit gate: the largest probability."""

    name = "top"

    def confidence(self, candidate: Candidate) -> torch.Tensor:
        logits = candidate.logits
        return (logits.amax(-1) - logits.logsumexp(-1)).exp().clamp(max=1.0)


class Margin(Gate):
    """Logit gate: the difference of the two largest probabilities."""

    name = "margin"

    def confidence(self, candidate: Candidate) -> torch.Tensor:
        logits = candidate.logits
        top = (logits.topk(2, dim=-1).values - logits.logsumexp(-1, keepdim=True)).exp()
        return (top[:, 0] - top[:, 1]).clamp(0.0, 1.0)


class Entropy(Gate):
    """Logit gate: 1 - entropy / largest possible entropy."""

    name = "entropy"

    def confidence(self, candidate: Candidate) -> torch.Tensor:
        logs = candidate.logits.log_softmax(-1)
        entropy = -(logs.exp() * logs).sum(-1)
        return (1.0 - entropy / math.log(logs.shape[-1])).clamp(0.0, 1.0)


class Patience(Gate):
    """Logit gate: n / (n + 1) after n repetitions of the prediction."""

    name = "patience"

    def confidence(self, candidate: Candidate) -> torch.Tensor:
        top, rows, memory = candidate.logits.argmax(-1), candidate.rows, candidate.memory
        if not memory:
            memory["top"] = top.new_full((candidate.n_rows,), -1)
            memory["streak"] = top.new_zeros(candidate.n_rows)
        top = torch.where(candidate.logits.isfinite().all(-1), top, -2)  # -2: no prediction
        same = (memory["top"][rows] == top) & (top >= 0)
        streak = torch.where(same, memory["streak"][rows] + 1, 0)
        memory["top"][rows], memory["streak"][rows] = top, streak
        return streak / (streak + 1.0)


class Saturation(Gate):
    """State gate: cosine to the state before the last layer, at least 0."""

    name = "saturation"

    def confidence(self, candidate: Candidate) -> torch.Tensor:
        cosine = torch.nn.functional.cosine_similarity(candidate.states.float(), candidate.before.float(), dim=-1)
        return cosine.clamp(0.0, 1.0)


class Classifier(Gate):
    """State gate: probability of the last layer's prediction, by logistic regression.

    Args:
        weights: for each candidate layer the weights [D] of `unit_states`, and a constant.
    """

    name = "classifier"

    def __init__(self, weights: Mapping[int, tuple[torch.Tensor, float]]) -> None:
        self.weights = weights

    def confidence(self, candidate: Candidate) -> torch.Tensor:
        weights, constant = self.weights[candidate.depth]
        return (unit_states(candidate.states) @ weights.to(candidate.states.device) + constant).sigmoid()


def unit_states(states: torch.Tensor) -> torch.Tensor:
    """States [.., D] scaled to a mean square of 1, float32."""
    wide = states.float()
    return wide * wide.pow(2).mean(-1, keepdim=True).clamp(min=1e-12).rsqrt()


def fit_classifier(
    states: Mapping[int, torch.Tensor], agrees: Mapping[int, torch.Tensor], penalty: float = 1e-2
) -> Classifier:
    """Fit a logistic regression for each candidate layer.

    Args:
        states: by candidate layer, [T, D].
        agrees: whether leaving there gives the last layer's prediction [T].
        penalty: `penalty / 2 * |weights|^2` is added to the mean loss.
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
        total = torch.nn.functional.binary_cross_entropy_with_logits(logits, targets)
        total = total + penalty / 2 * weights[:-1].pow(2).sum()
        total.backward()  # type: ignore[no-untyped-call]
        return total

    with torch.enable_grad():
        optimizer.step(loss)  # type: ignore[no-untyped-call]
    fitted = weights.detach()
    return fitted[:-1].clone(), float(fitted[-1])
