"""A small neural network that predicts the losses of plans."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional

from controller.base import Controller, Floats, LearningError, LossRange, Trial, fitted
from controller.models.files import WEIGHTS, Layout, metadata_of, read_metadata, read_weights


class MLPController(Controller):
    """One hidden layer, trained with AdamW on cross-entropy and on regret.

    The regret is the cost of the choice of `controller.base.ChoiceRule` beyond the best plan, at random prices, with a
    soft minimum so that it has a gradient. Cross-entropy keeps the predictions calibrated. Each plan's is weighted by
    how little its loss varies: where nearly all prompts lose nearly nothing, small differences are the signal.

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

    def _fit(self, features: Floats, losses: Floats, budgets: Floats) -> None:
        self.loss_range = LossRange.of(losses)
        targets = torch.from_numpy(self.loss_range.targets(losses[:, :-1]))
        inputs, lost, costs = (torch.from_numpy(array) for array in (features, losses, budgets))
        weights = _weights(targets)
        size = max(self.BATCH, len(inputs) // self.STEPS)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._seed)
            network = _Network(inputs.shape[1], self._hidden, targets.shape[1], self._ordinal, self._dropout)
            network.start_at(targets.mean(0))
            optimizer = torch.optim.AdamW(network.groups(self._weight_decay), lr=self._learning_rate, fused=True)
            for _ in range(self._epochs):
                for rows in torch.split(torch.randperm(len(inputs)), size):
                    optimizer.zero_grad()
                    logits = network(inputs[rows])
                    loss = functional.binary_cross_entropy_with_logits(logits, targets[rows], weight=weights)
                    if self._regret:
                        expected = 1 - (1 - self.loss_range.least) * logits.sigmoid()
                        regret = soft_regret(expected, lost[rows], costs)
                        loss = (1 - self._regret) * loss + self._regret * regret
                    loss.backward()  # type: ignore[no-untyped-call]
                    optimizer.step()
        self._network = network.eval()

    @torch.inference_mode()
    def _predict(self, features: Floats) -> Floats:
        return fitted(self.loss_range).losses(fitted(self._network)(torch.from_numpy(features)).sigmoid().numpy())

    def save(self, folder: Path) -> None:
        save_file(fitted(self._network).state_dict(), folder / WEIGHTS, metadata_of(self.loss_range))

    @classmethod
    def load(cls, folder: Path) -> MLPController:
        weights = read_weights(folder, LAYOUT)
        (hidden, n_features), n_outputs = weights["inner.weight"].shape, len(weights["outer.weight"])
        n_plans, controller = len(weights["bias"]), cls()
        controller.loss_range, _ = read_metadata(folder, {})
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
"""Prices between which training draws, in decoders for a loss of 1."""
SOFTNESS = 0.02
"""Of the soft minimum, in shares of the most that a plan can cost."""
SCALE = 8.0
"""Brings regret to the size of the cross-entropy."""


def _weights(targets: torch.Tensor) -> torch.Tensor:
    """Weights [K - 1]: Bernoulli variance over variance of the targets [N, K - 1]."""
    mean = targets.mean(0)
    return (mean * (1 - mean) / targets.var(0, correction=0).clamp(min=LEAST_VARIANCE)).clamp(min=1.0)


def soft_regret(predicted: torch.Tensor, losses: torch.Tensor, budgets: torch.Tensor) -> torch.Tensor:
    """Mean cost of the softly chosen plan over N rows, at random prices.

    Args:
        predicted: losses of the shortened plans [N, K - 1].
        losses: true [N, K].
        budgets: of the plans [K].
    """
    prices = torch.empty(len(losses), 1).uniform_(math.log(LOWEST), math.log(HIGHEST)).exp()
    expected = budgets + prices * torch.cat([predicted, losses[:, -1:]], dim=1)
    true = (budgets + prices * losses) / (1 + prices)
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

    def start_at(self, means: torch.Tensor) -> None:
        """Predict the mean targets [K - 1] before anything is learned."""
        with torch.no_grad():
            self.bias.copy_(means.clamp(0.01, 0.99).logit())

    def groups(self, weight_decay: float) -> list[dict[str, object]]:
        """Parameters for AdamW, biases without decay."""
        weights, biases = [self.inner.weight, self.outer.weight], [self.inner.bias, self.bias]
        return [{"params": weights, "weight_decay": weight_decay}, {"params": biases, "weight_decay": 0.0}]

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        hidden = functional.gelu(self.inner(self.dropout(features)))
        logits: torch.Tensor = self.outer(self.dropout(hidden)) + self.bias
        return logits
