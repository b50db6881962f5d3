"""A small neural network that predicts the quality of plans."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from controller.base import Controller, Floats, LearningError, Trial, fitted
from controller.models.files import WEIGHTS, Layout, read_weights


class MLPController(Controller):
    """One hidden layer, trained with AdamW on cross-entropy and on regret.

    The regret is the cost of the choice of `controller.base.choose` beyond the best plan, at random prices, with a soft
    minimum so that it has a gradient. Cross-entropy keeps the predictions calibrated. Each plan's is weighted by how
    little its quality varies: where nearly all prompts keep nearly all, small differences are the signal.

    Source: training through the decision, Wilder et al. 2019 (arXiv 1809.05504, section 3); cumulative links,
    McCullagh 1980, Regression Models for Ordinal Data, section 2.

    Args:
        hidden: width of the hidden layer.
        learning_rate: of AdamW.
        weight_decay: of AdamW, on the weights.
        dropout: on the inputs and the hidden layer while training.
        epochs: passes over the prompts.
        regret: share of the regret in the loss; 0 is cross-entropy alone.
        ordinal: one score for each prompt and a threshold for each plan, instead of an output for each plan.
        seed: of weights, order, dropout and prices.
    """

    FILES = (WEIGHTS,)
    BATCH, STEPS = 64, 8
    """Rows of a batch, and the batches of an epoch above which batches grow instead."""

    def __init__(
        self,
        hidden: int = 16,
        learning_rate: float = 5e-3,
        weight_decay: float = 0.5,
        dropout: float = 0.2,
        epochs: int = 50,
        regret: float = 0.5,
        ordinal: bool = False,
        seed: int = 0,
    ) -> None:
        self._hidden, self._dropout, self._ordinal = hidden, dropout, ordinal
        self._learning_rate, self._weight_decay = learning_rate, weight_decay
        self._epochs, self._regret, self._seed = epochs, regret, seed
        self._network: _Network | None = None

    @staticmethod
    def suggest(trial: Trial) -> dict[str, Any]:
        return {
            "hidden": trial.suggest_int("hidden", 8, 128, log=True),
            "learning_rate": trial.suggest_float("learning_rate", 1e-3, 2e-2, log=True),
            "weight_decay": trial.suggest_float("weight_decay", 1e-2, 3.0, log=True),
            "dropout": trial.suggest_float("dropout", 0.0, 0.6),
            "epochs": trial.suggest_int("epochs", 15, 80, log=True),
            "regret": trial.suggest_float("regret", 0.0, 0.9),
            "ordinal": trial.suggest_categorical("ordinal", [False, True]),
        }

    def _fit(self, features: Floats, quality: Floats, budgets: Floats) -> None:
        inputs, targets, costs = (torch.from_numpy(array) for array in (features, quality, budgets))
        weights = _weights(targets[:, :-1])
        size = max(self.BATCH, len(inputs) // self.STEPS)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._seed)
            network = _Network(inputs.shape[1], self._hidden, targets.shape[1] - 1, self._ordinal, self._dropout)
            network.start_at(targets[:, :-1].mean(0))
            optimizer = torch.optim.AdamW(network.groups(self._weight_decay), lr=self._learning_rate, fused=True)
            for _ in range(self._epochs):
                for rows in torch.split(torch.randperm(len(inputs)), size):
                    optimizer.zero_grad()
                    loss = self._loss(network(inputs[rows]), targets[rows], costs, weights)
                    loss.backward()  # type: ignore[no-untyped-call]
                    optimizer.step()
        self._network = network.eval()

    def _loss(
        self, logits: torch.Tensor, quality: torch.Tensor, budgets: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        entropy = nn.functional.binary_cross_entropy_with_logits(logits, quality[:, :-1], weight=weights)
        if not self._regret:
            return entropy
        return (1 - self._regret) * entropy + self._regret * soft_regret(logits.sigmoid(), quality, budgets)

    @torch.inference_mode()
    def _predict(self, features: Floats) -> Floats:
        quality: Floats = fitted(self._network)(torch.from_numpy(features)).sigmoid().numpy()
        return np.column_stack([quality, np.ones(len(quality))])

    def save(self, folder: Path) -> None:
        save_file(fitted(self._network).state_dict(), folder / WEIGHTS)

    @classmethod
    def load(cls, folder: Path) -> MLPController:
        weights = read_weights(folder, LAYOUT)
        (hidden, n_features), n_outputs = weights["inner.weight"].shape, len(weights["outer.weight"])
        n_plans, controller = len(weights["bias"]), cls()
        if n_outputs not in (1, n_plans):
            raise LearningError(f"{folder} holds no MLP: it has {n_outputs} outputs for {n_plans} plans")
        controller._network = _Network(n_features, hidden, n_plans, n_outputs < n_plans, 0.0).eval()
        controller._network.load_state_dict(weights)
        return controller


LAYOUT: Layout = {
    "inner.weight": ("hidden", "features"),
    "inner.bias": ("hidden",),
    "outer.weight": ("outputs", "hidden"),
    "bias": ("plans",),
}

LEAST_VARIANCE = 1e-4
LOWEST, HIGHEST = 0.2, 30.0
"""Prices between which training draws, in decoders for all of the quality."""
SOFTNESS = 0.02
"""Of the soft minimum, in shares of the most that a plan can cost."""
SCALE = 8.0
"""Brings regret to the size of the cross-entropy."""


def _weights(shares: torch.Tensor) -> torch.Tensor:
    """Weights [K - 1]: Bernoulli variance over variance of the quality [N, K - 1]."""
    mean = shares.mean(0)
    return (mean * (1 - mean) / shares.var(0, correction=0).clamp(min=LEAST_VARIANCE)).clamp(min=1.0)


def soft_regret(predicted: torch.Tensor, quality: torch.Tensor, budgets: torch.Tensor) -> torch.Tensor:
    """Mean cost of the softly chosen plan over N rows, at random prices.

    Args:
        predicted: quality of the shortened plans [N, K - 1].
        quality: true [N, K].
        budgets: of the plans [K].
    """
    prices = torch.empty(len(quality), 1).uniform_(math.log(LOWEST), math.log(HIGHEST)).exp()
    full = quality[:, -1:]
    expected = budgets + prices * (1 - torch.cat([predicted, full], dim=1) / full)
    true = (budgets + prices * (1 - quality / full)) / (1 + prices)
    weights = torch.softmax(-expected / (SOFTNESS * (1 + prices)), dim=1)
    return SCALE * (weights * true).sum(1).mean()


class _Network(nn.Module):
    """Logits [N, K - 1] of features [N, F]; an ordinal one has one output and K - 1 biases."""

    def __init__(self, n_features: int, hidden: int, n_plans: int, ordinal: bool, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.inner = nn.Linear(n_features, hidden)
        self.outer = nn.Linear(hidden, 1 if ordinal else n_plans, bias=False)
        self.bias = nn.Parameter(torch.zeros(n_plans))

    def start_at(self, shares: torch.Tensor) -> None:
        """Predict this mean quality [K - 1] before anything is learned."""
        with torch.no_grad():
            self.bias.copy_(shares.clamp(0.01, 0.99).logit())

    def groups(self, weight_decay: float) -> list[dict[str, object]]:
        """Parameters for AdamW, biases without decay."""
        weights, biases = [self.inner.weight, self.outer.weight], [self.inner.bias, self.bias]
        return [{"params": weights, "weight_decay": weight_decay}, {"params": biases, "weight_decay": 0.0}]

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        hidden = nn.functional.gelu(self.inner(self.dropout(features)))
        logits: torch.Tensor = self.outer(self.dropout(hidden)) + self.bias
        return logits
