"""Logistic regression that predicts the losses of plans."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.nn import functional

from controller.base import Controller, Floats, LossRange, Trial, fitted
from controller.models.files import WEIGHTS, metadata_of, read_metadata, read_weights


class LogisticController(Controller):
    """One linear model for each plan, by L-BFGS on penalised cross-entropy.

    Args:
        l2: penalty on the weights, per prompt.
    """

    FILES = (WEIGHTS,)
    STEPS = 60

    def __init__(self, l2: float = 0.03) -> None:
        self._l2 = l2
        self._weights: dict[str, torch.Tensor] | None = None

    @staticmethod
    def suggest(trial: Trial) -> dict[str, Any]:
        return {"l2": trial.suggest_float("l2", 1e-4, 3.0, log=True)}

    def _fit(self, features: Floats, losses: Floats, budgets: Floats) -> None:
        self.loss_range = LossRange.of(losses)
        inputs, targets = torch.from_numpy(features), torch.from_numpy(self.loss_range.targets(losses[:, :-1]))
        weight = torch.zeros(targets.shape[1], inputs.shape[1], requires_grad=True)
        bias = torch.zeros(targets.shape[1], requires_grad=True)
        optimizer = torch.optim.LBFGS([weight, bias], max_iter=self.STEPS, line_search_fn="strong_wolfe")

        def loss() -> torch.Tensor:
            optimizer.zero_grad()
            error = functional.binary_cross_entropy_with_logits(functional.linear(inputs, weight, bias), targets)
            total = error + self._l2 * weight.square().sum() / targets.shape[1]
            total.backward()  # type: ignore[no-untyped-call]
            return total

        optimizer.step(loss)  # type: ignore[no-untyped-call]
        self._weights = {"weight": weight.detach(), "bias": bias.detach()}

    @torch.inference_mode()
    def _predict(self, features: Floats) -> Floats:
        logits = functional.linear(torch.from_numpy(features), **fitted(self._weights))
        return fitted(self.loss_range).losses(logits.sigmoid().numpy())

    def save(self, folder: Path) -> None:
        save_file(fitted(self._weights), folder / WEIGHTS, metadata_of(self.loss_range))

    @classmethod
    def load(cls, folder: Path) -> LogisticController:
        controller = cls()
        controller.loss_range, _ = read_metadata(folder, {})
        controller._weights = read_weights(folder, {"weight": ("plans", "features"), "bias": ("plans",)})
        return controller
