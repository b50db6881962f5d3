"""What an adapter's training changes: LoRA matrices or vectors of some layers, and the menu's bridges."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from backbone.adapters import Adapter, AdapterError
from backbone.bridges import Bridge, Bridges
from backbone.families import decoder_layers
from backbone.plan import LayerPlan
from backbone.stand_ins import Attached, detach, set_attached, swaps_of

Where = Literal["all", "beside_gaps", "vectors", "nowhere"]
"""Weights that an adapter changes: all matrices, those of the layers next to a gap, norms and biases, or none."""


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
        self, model: PreTrainedModel, plans: Sequence[LayerPlan], bridges: Bridges, layers: Sequence[int],
        where: Where, rank: int, seed: int,
    ) -> None:  # fmt: skip
        self._model, self.plans, self._layers = model, list(plans), layers
        self._wrapped = _with_lora(model, layers, rank, seed) if where in ("all", "beside_gaps") else None
        self._vectors = _vectors(model, layers) if where == "vectors" else {}
        self._bridges = {plan: {i: _copied(b, model) for i, b in of_plan.items()} for plan, of_plan in bridges.items()}
        self.parameters: dict[str, nn.Parameter] = {}
        for name, layer in self._lora():
            self.parameters[f"{name}.up"] = layer.lora_B["default"].weight
            self.parameters[f"{name}.down"] = layer.lora_A["default"].weight
        for plan, of_plan in self._bridges.items():
            for first, bridge in of_plan.items():
                for part, tensor in bridge.tensors().items():
                    assert isinstance(tensor, nn.Parameter)
                    self.parameters[f"bridge {plan} {first} {part}"] = tensor
        self.parameters |= self._vectors

    def is_bridge(self, name: str) -> bool:
        return name.startswith("bridge ")

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Within this block, shortened plans run with the parameters as they are now, differentiably."""
        weights = {
            n: (self._model.get_parameter(n) + delta).to(self._model.dtype) for n, delta in self._vectors.items()
        }
        swaps = swaps_of(self._model, weights)
        set_attached(self._model, Attached("in training", self._bridges, swaps, frozenset(self._layers)))
        try:
            yield
        finally:
            detach(self._model)

    def off(self) -> AbstractContextManager[None]:
        """Within this block the model computes as it did before."""
        return nullcontext() if self._wrapped is None else self._wrapped.disable_adapter()  # type: ignore[no-any-return]

    @torch.no_grad()
    def result(self) -> tuple[Adapter | None, Bridges]:
        """What was trained: copies on the CPU, matrices in bfloat16, vectors in float32."""
        changes: dict[str, tuple[torch.Tensor, ...]] = {}
        for name, layer in self._lora():
            up = layer.lora_B["default"].weight * layer.scaling["default"]
            changes[f"{name}.weight"] = (_stored(up), _stored(layer.lora_A["default"].weight))
        changes |= {name: (delta.detach().cpu().clone(),) for name, delta in self._vectors.items()}
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

    def _lora(self) -> list[tuple[str, LoraLayer]]:
        return [(name, module) for name, module in self._model.named_modules() if isinstance(module, LoraLayer)]


def _with_lora(model: PreTrainedModel, layers: Sequence[int], rank: int, seed: int) -> PeftModel:
    names = {id(module): name for name, module in model.named_modules()}
    chosen = [module for i in layers for module in decoder_layers(model)[i].modules()]
    targets = [names[id(module)] for module in chosen if isinstance(module, nn.Linear | Conv1D)]
    if not targets or any(not model.get_parameter(f"{name}.weight").is_floating_point() for name in targets):
        raise AdapterError(
            f"{type(model).__name__} has no floating-point matrices in layers {layers} that LoRA could be trained on "
            "(a quantised model cannot be trained through): load it unquantised, or use adapt.method=bridges"
        )
    torch.manual_seed(seed)
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets))  # type: ignore[return-value]


def _vectors(model: PreTrainedModel, layers: Sequence[int]) -> dict[str, nn.Parameter]:
    inside = {id(p) for i in layers for p in decoder_layers(model)[i].parameters() if p.dim() == 1}
    named = [(name, p) for name, p in model.named_parameters() if id(p) in inside]
    return {name: nn.Parameter(torch.zeros_like(p, dtype=torch.float32)) for name, p in named}


def _copied(bridge: Bridge, model: PreTrainedModel) -> Bridge:
    fresh = bridge.to(model.device, torch.float32)
    parts = {name: nn.Parameter(tensor.clone()) for name, tensor in fresh.tensors().items()}
    return Bridge.from_tensors(parts)


def _stored(matrix: torch.Tensor) -> torch.Tensor:
    return matrix.detach().to("cpu", torch.bfloat16).contiguous()
