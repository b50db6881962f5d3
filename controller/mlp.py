"""A small neural network: features -> one probability a plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from controller.base import Bools, Controller, Floats, Trial


class MLPController(Controller):
    """One hidden layer, trained on the cross-entropy of "this plan is sufficient" with AdamW.

    Args:
        hidden: width of the hidden layer.
        learning_rate: of AdamW.
        weight_decay: of AdamW.
        dropout: on the inputs and the hidden layer while training.
        epochs: passes over the prompts, in batches of 32.
        seed: of weights, order and dropout.
    """

    BATCH = 32

    def __init__(
        self,
        hidden: int = 32,
        learning_rate: float = 3e-3,
        weight_decay: float = 1e-2,
        dropout: float = 0.2,
        epochs: int = 40,
        seed: int = 0,
    ) -> None:
        self._hidden, self._dropout = hidden, dropout
        self._learning_rate, self._weight_decay = learning_rate, weight_decay
        self._epochs, self._seed = epochs, seed
        self._network: nn.Module | None = None

    @staticmethod
    def suggest(trial: Trial) -> dict[str, Any]:
        return {
            "hidden": trial.suggest_int("hidden", 8, 128, log=True),
            "learning_rate": trial.suggest_float("learning_rate", 3e-4, 1e-2, log=True),
            "weight_decay": trial.suggest_float("weight_decay", 1e-4, 1.0, log=True),
            "dropout": trial.suggest_float("dropout", 0.0, 0.6),
            "epochs": trial.suggest_int("epochs", 10, 80, log=True),
        }

    def fit(self, features: Floats, sufficient: Bools, budgets: Floats) -> None:
        inputs = torch.from_numpy(np.array(features, dtype=np.float32))
        targets = torch.from_numpy(sufficient[:, :-1].astype(np.float32))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._seed)
            network = _network(inputs.shape[1], self._hidden, targets.shape[1], self._dropout).train()
            optimizer = torch.optim.AdamW(network.parameters(), lr=self._learning_rate, weight_decay=self._weight_decay)
            for _ in range(self._epochs):
                for rows in torch.split(torch.randperm(len(inputs)), self.BATCH):
                    loss = nn.functional.binary_cross_entropy_with_logits(network(inputs[rows]), targets[rows])
                    optimizer.zero_grad()
                    loss.backward()  # type: ignore[no-untyped-call]
                    optimizer.step()
        self._network = network.eval()

    @torch.inference_mode()
    def predict(self, features: Floats) -> Floats:
        if self._network is None:
            raise RuntimeError("this controller was not fitted")
        sure: Floats = self._network(torch.from_numpy(np.array(features, dtype=np.float32))).sigmoid().numpy()
        return np.column_stack([sure, np.ones(len(sure), dtype=np.float32)])

    def save(self, folder: Path) -> None:
        if self._network is None:
            raise RuntimeError("this controller was not fitted")
        save_file(self._network.state_dict(), folder / "controller.safetensors")

    @classmethod
    def load(cls, folder: Path) -> MLPController:
        weights = load_file(folder / "controller.safetensors")
        (hidden, n_features), n_plans = weights["1.weight"].shape, len(weights["4.bias"])
        controller = cls(hidden=hidden)
        controller._network = _network(n_features, hidden, n_plans, 0.0).eval()
        controller._network.load_state_dict(weights)
        return controller


def _network(n_features: int, hidden: int, n_outputs: int, dropout: float) -> nn.Module:
    return nn.Sequential(
        nn.Dropout(dropout), nn.Linear(n_features, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, n_outputs)
    )
