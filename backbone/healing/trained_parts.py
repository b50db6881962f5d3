"""What training changes, LoRA matrices of some layers and the menu's bridges, and the checkpoint of its state."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from backbone.errors import UnsupportedModelError
from backbone.families import decoder_layers
from backbone.files import replacing
from backbone.healing.healing import Adapter, Bridge, Bridges, ReadyHealing
from backbone.healing.settings import Where
from backbone.plan import LayerPlan

LORA_SCALE = 2.0
"""What the product of the LoRA matrices is multiplied with."""


def adapted_layers(plans: Sequence[LayerPlan], probe_depth: int, where: Where) -> list[int]:
    """Layers whose weights an adapter may change: from the probe depth on, since the probe runs before the choice."""
    every = set(range(probe_depth, plans[0].n_layers))
    if where == "beside_gaps":
        every &= {layer for plan in plans for gap in plan.gaps for layer in (gap.start - 1, gap.stop)}
    run = {layer for plan in plans for layer in plan.attention | plan.mlp}
    return [] if where == "nowhere" else sorted(every & run)


class Trainable:
    """The parameters under training, in float32, and the model prepared to run with them.

    Attributes:
        parameters: by name.
        plans: the shortened plans.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        plans: Sequence[LayerPlan],
        bridges: Bridges,
        layers: Sequence[int],
        where: Where,
        rank: int,
        seed: int,
    ) -> None:
        self._model, self.plans, self._layers = model, list(plans), layers
        targets = [] if where == "nowhere" else _matrix_modules(model, layers)
        self._wrapped = _with_lora(model, targets, rank, seed) if targets else None
        self._lora = {name: model.get_submodule(name) for name in targets}
        self._bridges = {plan: {i: _copied(b, model) for i, b in of_plan.items()} for plan, of_plan in bridges.items()}
        self.parameters: dict[str, nn.Parameter] = {}
        for name, layer in self._lora.items():
            self.parameters[f"{name}.up"], self.parameters[f"{name}.down"] = _matrices(layer)
        for plan, of_plan in self._bridges.items():
            for first, bridge in of_plan.items():
                for part, tensor in bridge.tensors().items():
                    assert isinstance(tensor, nn.Parameter)
                    self.parameters[f"bridge {plan} {first} {part}"] = tensor

    def is_bridge(self, name: str) -> bool:
        return name.startswith("bridge ")

    @contextmanager
    def healing(self) -> Iterator[ReadyHealing]:
        """Yields what shortened plans run with in this block: the parameters as they are now, differentiably."""
        with _in_half_precision(self._model):
            yield ReadyHealing("in training", self._bridges, changed=frozenset(self._layers))

    def off(self) -> AbstractContextManager[None]:
        """Within this block the model computes as it did before."""
        return nullcontext() if self._wrapped is None else self._wrapped.disable_adapter()

    @torch.no_grad()
    def result(self) -> tuple[Adapter | None, Bridges]:
        """What was trained: copies on the CPU, in bfloat16."""
        changes = {}
        for name, layer in self._lora.items():
            up, down = _matrices(layer)
            changes[f"{name}.weight"] = (_stored(up * LORA_SCALE), _stored(down))
        bridges = {
            plan: {first: bridge.to(torch.device("cpu"), torch.bfloat16) for first, bridge in of_plan.items()}
            for plan, of_plan in self._bridges.items()
        }
        return Adapter(changes) if changes else None, bridges

    def close(self) -> None:
        """The model is what it was before."""
        if self._wrapped is not None:
            self._wrapped.unload()
            self._wrapped = None


def _matrices(layer: Any) -> tuple[nn.Parameter, nn.Parameter]:
    """Up [out, r] and down [r, in] of a layer that PEFT wrapped."""
    up, down = layer.lora_B["default"].weight, layer.lora_A["default"].weight
    assert isinstance(up, nn.Parameter)
    assert isinstance(down, nn.Parameter)
    return up, down


def _matrix_modules(model: PreTrainedModel, layers: Sequence[int]) -> list[str]:
    """Names of the modules in some layers whose matrices LoRA can change."""
    names = {id(module): name for name, module in model.named_modules()}
    chosen = [module for i in layers for module in decoder_layers(model)[i].modules()]
    targets = [names[id(module)] for module in chosen if isinstance(module, nn.Linear | Conv1D)]
    if not targets or any(not model.get_parameter(f"{name}.weight").is_floating_point() for name in targets):
        raise UnsupportedModelError(
            f"{type(model).__name__} has no floating-point matrices in layers {layers} that LoRA could be trained on "
            "(a quantised model cannot be trained through): load it unquantised, or use adapt.method=bridges"
        )
    return targets


def _with_lora(model: PreTrainedModel, targets: Sequence[str], rank: int, seed: int) -> Any:
    """PEFT's model around this one, whose modules it replaces until `unload`."""
    from peft import LoraConfig, get_peft_model  # slow, and needed for training alone

    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=int(LORA_SCALE * rank), target_modules=list(targets))
    return get_peft_model(model, config)


@contextmanager
def _in_half_precision(model: PreTrainedModel) -> Iterator[None]:
    """Within this block a model in half precision takes LoRA's products in its own dtype.

    PEFT would raise the states of every adapted matrix to float32 and back, which takes longer than the products.
    """
    from peft.helpers import disable_input_dtype_casting  # slow, and needed for training alone

    half = model.dtype in (torch.bfloat16, torch.float16)
    with disable_input_dtype_casting(model, active=half), torch.autocast(model.device.type, model.dtype, enabled=half):
        yield


def _copied(bridge: Bridge, model: PreTrainedModel) -> Bridge:
    fresh = bridge.to(model.device, torch.float32)
    parts = {name: nn.Parameter(tensor.clone()) for name, tensor in fresh.tensors().items()}
    return Bridge.from_tensors(parts)


def _stored(matrix: torch.Tensor) -> torch.Tensor:
    return matrix.detach().to("cpu", torch.bfloat16).contiguous()


_PARAMETER, _BEST, _MOMENT = "parameter/", "best/", "moment/"


class Checkpoint:
    """Parameters, AdamW's moments, the best parameters so far, and a state that JSON can hold, in one file."""

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
