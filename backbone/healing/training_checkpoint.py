"""Where a training run stands: one safetensors file, replaced at once, so that a kill leaves the old or the new."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from backbone.files import replacing

_PARAMETER, _BEST, _MOMENT = "parameter/", "best/", "moment/"


class Checkpoint:
    """Parameters, AdamW's moments, the best parameters so far, and a state that JSON can hold."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._best: dict[str, torch.Tensor] = {}

    def save(
        self,
        parameters: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        state: dict[str, Any],
        *,
        better: bool,
    ) -> None:
        """`better`: the parameters as they are now are the best so far."""
        now = {name: parameter.detach().cpu().clone() for name, parameter in parameters.items()}
        if better:
            self._best = now
        tensors = {_PARAMETER + name: tensor for name, tensor in now.items()}
        tensors |= {_BEST + name: tensor.clone() for name, tensor in self._best.items()}
        for name, parameter in parameters.items():
            for kind, value in optimizer.state.get(parameter, {}).items():
                tensors[f"{_MOMENT}{kind}/{name}"] = value.detach().cpu().clone()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self._path) as unfinished:
            save_file(tensors, unfinished, {"state": json.dumps(state)})

    def load(self, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, Any] | None:
        """Put parameters and optimiser where they stood; the state, or None where there is no checkpoint."""
        if not self._path.exists():
            return None
        with safe_open(self._path, "pt") as file:
            state: dict[str, Any] = json.loads(file.metadata()["state"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        self._best = {n.removeprefix(_BEST): t for n, t in tensors.items() if n.startswith(_BEST)}
        _copy(parameters, {n.removeprefix(_PARAMETER): t for n, t in tensors.items() if n.startswith(_PARAMETER)})
        for name, tensor in tensors.items():
            if name.startswith(_MOMENT):
                kind, own = name.removeprefix(_MOMENT).split("/", 1)
                parameter = parameters[own]
                value = tensor if kind == "step" else tensor.to(parameter.device)
                optimizer.state[parameter][kind] = value
        return state

    def load_best(self, parameters: Mapping[str, nn.Parameter]) -> None:
        _copy(parameters, self._best)

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)


@torch.no_grad()
def _copy(parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, torch.Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(tensors[name])
