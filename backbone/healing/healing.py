"""Healing: the bridges and the adapter that make a shortened plan better, and made ready for one model.

A bridge is an affine map that replaces the layers of a gap: it maps the state before them to about the state after them
(Din et al. 2023, arXiv 2303.09435, section 3; ReplaceMe, Shopkhoev et al. 2025, arXiv 2505.02819, section 3).

An adapter changes some weights for all shortened plans, each by a low-rank product, LoRA (Hu et al. 2021, arXiv
2106.09685, section 4). It is merged into a copy of the weight, so that an adapted layer costs no more time than any
other, at the price of one more copy of the adapted weights in memory, however many plans use it.

Shapes: `D` hidden size, `r` rank.
"""

from __future__ import annotations

import copy
import hashlib
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from backbone.errors import ArtefactError, PlanError, UnsupportedModelError, WrongModelError
from backbone.families import decoder_layers, model_fingerprint, sublayer_bytes
from backbone.plan import LayerPlan


@dataclass(frozen=True, slots=True, eq=False)
class Bridge:
    """Replaces the layers of one gap: state -> state + state @ (product of factors) + bias.

    Attributes:
        factors: one matrix [D, D], or two, [D, r] and [r, D].
        bias: [D].
    """

    factors: tuple[torch.Tensor, ...]
    bias: torch.Tensor

    def __call__(self, state: torch.Tensor) -> torch.Tensor:
        change = state
        for factor in self.factors:
            change = change @ factor.to(state.dtype)
        return state + change + self.bias.to(state.dtype)

    @property
    def parameters(self) -> list[torch.Tensor]:
        return [*self.factors, self.bias]

    @property
    def rank(self) -> int:
        return self.factors[0].shape[1]

    def to(self, device: torch.device, dtype: torch.dtype) -> Bridge:
        """The same map, its tensors moved and rounded."""
        return Bridge(tuple(f.to(device, dtype) for f in self.factors), self.bias.to(device, dtype))

    def tensors(self) -> dict[str, torch.Tensor]:
        """By name, as `from_tensors` takes them."""
        return {f"factor_{index}": factor for index, factor in enumerate(self.factors)} | {"bias": self.bias}

    @classmethod
    def from_tensors(cls, named: Mapping[str, torch.Tensor]) -> Bridge:
        factors = tuple(named[name] for name in sorted(named) if name.startswith("factor_"))
        return cls(factors, named["bias"])


Bridges = Mapping[LayerPlan, Mapping[int, Bridge]]
"""For each plan its bridges, by the first layer of the gap; of the full depth the exit head, by L."""


@dataclass(frozen=True, slots=True)
class Swap:
    """A linear layer with another weight while a shortened plan runs.

    Attributes:
        forward: takes the place of the module's own.
        change: what the other weight adds to the output, inputs [.., in] -> [.., out], where only some rows are
            shortened.
    """

    module: nn.Module
    forward: Callable[..., Any]
    change: Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """Changes of a model's weights.

    Attributes:
        changes: by parameter name, the weight of a linear layer; up [out, r] and down [r, in], whose product is added.
    """

    changes: Mapping[str, tuple[torch.Tensor, torch.Tensor]]

    def merged(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """By parameter name, copies of the changed weights, in the model's dtype and on its devices.

        Raises:
            UnsupportedModelError: a weight that the model lacks, of another shape, quantised, or not in memory.
        """
        return {name: self._merged(model, name) for name in self.changes}

    @torch.no_grad()
    def _merged(self, model: nn.Module, name: str) -> nn.Parameter:
        owner, _, own_name = name.rpartition(".")
        try:
            module = model.get_submodule(owner)
            weight = getattr(module, own_name)
        except AttributeError:
            raise UnsupportedModelError(f"this adapter changes {name}, which the model does not have") from None
        if not isinstance(module, nn.Linear | Conv1D) or own_name != "weight":
            raise UnsupportedModelError(f"this adapter changes {name}, which is not the weight of a linear layer")
        if not weight.is_floating_point() or weight.is_meta:
            kind = "is not in memory" if weight.is_meta else f"is kept as {weight.dtype} (quantised)"
            raise UnsupportedModelError(
                f"this adapter changes {name}, which {kind}; load the model unquantised, on one device"
            )
        up, down = (factor.to(weight.device, torch.float32) for factor in self.changes[name])
        change = (up @ down).T if isinstance(module, Conv1D) else up @ down
        if change.shape != weight.shape:
            raise UnsupportedModelError(
                f"this adapter changes {name} of shape {tuple(change.shape)}, the model's is {tuple(weight.shape)}"
            )
        return nn.Parameter((weight.float() + change).to(weight.dtype), requires_grad=False)

    def swaps(self, model: nn.Module) -> tuple[Swap, ...]:
        """The changed modules of a model: each the module's own code on a shallow copy with its merged weight."""
        found = []
        for name, weight in self.merged(model).items():
            module = model.get_submodule(name.removesuffix(".weight"))
            twin = copy.copy(module)  # other threads may be running the module
            twin.__dict__["_parameters"] = {**module._parameters, "weight": weight}
            up, down = (factor.to(weight.device, weight.dtype) for factor in self.changes[name])
            found.append(Swap(module, partial(type(module).forward, twin), partial(_low_rank, up, down)))
        return tuple(found)


def _low_rank(up: torch.Tensor, down: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    return (inputs @ down.T) @ up.T


@dataclass(frozen=True, slots=True, eq=False)
class ReadyHealing:
    """Healing as one model runs with it: on its devices, in its dtype, merged.

    Attributes:
        digest: of the healing; empty where it holds nothing.
        bridges: see `Healing`.
        swaps: the modules that compute with other weights.
        changed: the layers whose weights are not the full plan's.
    """

    digest: str
    bridges: Bridges
    swaps: tuple[Swap, ...] = ()
    changed: frozenset[int] = frozenset()


@dataclass(frozen=True, eq=False)
class Healing:
    """Bridges and an adapter for the shortened plans of one model, for `apply_plan`. The full plan never sees them.

    Attributes:
        fingerprint: of the model that they were made for.
        bridges: for each plan its bridges, by the first layer of the gap. A plan without an entry has none.
        adapter: changes of weights for every plan but the full one.
    """

    fingerprint: str
    bridges: Bridges = field(default_factory=dict)
    adapter: Adapter | None = None

    def __repr__(self) -> str:
        weights = 0 if self.adapter is None else len(self.adapter.changes)
        return f"Healing(for {self.fingerprint}: bridges for {len(self.bridges)} plans, {weights} changed weights)"

    @cached_property
    def digest(self) -> str:
        """Twelve hexadecimal digits that name the content."""
        content = hashlib.sha256(self.fingerprint.encode())
        for name, tensor in sorted(self.tensors().items()):
            content.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            content.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return content.hexdigest()[:12]

    @property
    def is_empty(self) -> bool:
        return not self.bridges and self.adapter is None

    def cost(self, model: PreTrainedModel, plan: LayerPlan) -> float:
        """What the bridges of a plan add to its budget: their parameters as a share of the decoder's.

        Merged changes of weights add nothing.
        """
        layer = decoder_layers(model)[0]
        item = next(layer.parameters()).element_size()
        numbers = sum(p.numel() for bridge in self.bridges.get(plan, {}).values() for p in bridge.parameters)
        return numbers * item / sum(sum(pair) for pair in sublayer_bytes(model))

    def tensors(self) -> dict[str, torch.Tensor]:
        """By name: of a bridge its plan, first layer and part; of a change its parameter and a number."""
        found = {
            f"bridge|{plan.n_layers}|{plan}|{first}|{name}": tensor
            for plan, of_plan in self.bridges.items()
            for first, bridge in of_plan.items()
            for name, tensor in bridge.tensors().items()
        }
        for parameter, factors in (self.adapter.changes if self.adapter else {}).items():
            found |= {f"change|{parameter}|{index}": factor for index, factor in enumerate(factors)}
        return {name: tensor.detach().contiguous() for name, tensor in found.items()}

    def save(self, path: Path) -> None:
        """One safetensors file."""
        from backbone.healing.healing_file import save_healing  # which needs this class

        save_healing(self, path)

    @staticmethod
    def load(path: Path) -> Healing:
        """Raises ArtefactError: no such file, or one that holds something else."""
        from backbone.healing.healing_file import load_healing

        return load_healing(path)

    def ready(self, model: PreTrainedModel) -> ReadyHealing:
        """As this model runs with it; made once, and kept as long as both live, outside of the model.

        Raises:
            WrongModelError: it was made for another model.
            ArtefactError: it is for states of another size.
            UnsupportedModelError: the model's weights cannot be changed, for example since they are quantised.
        """
        place = model.device, model.dtype
        with _making_ready:
            own = _ready.setdefault(self, WeakKeyDictionary())
            if own.get(model, (None, None))[0] != place:
                equal = [known[model] for one, known in _ready.items() if model in known and one.digest == self.digest]
                own[model] = next((found for found in equal if found[0] == place), None) or (place, self._made(model))
            return own[model][1]

    def _made(self, model: PreTrainedModel) -> ReadyHealing:
        if (found := model_fingerprint(model)) != self.fingerprint:
            raise WrongModelError(f"these healing parts were made for {self.fingerprint}, the model given is {found}")
        layers, size = list(decoder_layers(model)), model.config.get_text_config().hidden_size
        if wrong := {len(bridge.bias) for of_plan in self.bridges.values() for bridge in of_plan.values()} - {size}:
            raise ArtefactError(f"this healing is for states of {min(wrong)} numbers, those of this model have {size}")
        devices = [next(layer.parameters()).device for layer in (*layers, layers[-1])]
        bridges = {
            plan: {first: bridge.to(devices[first], model.dtype) for first, bridge in of_plan.items()}
            for plan, of_plan in self.bridges.items()
        }
        swaps = () if self.adapter is None else self.adapter.swaps(model)
        owners = {id(swap.module) for swap in swaps}
        changed = (index for index, layer in enumerate(layers) if any(id(part) in owners for part in layer.modules()))
        return ReadyHealing("" if self.is_empty else self.digest, bridges, swaps, frozenset(changed))


_Made = tuple[tuple[torch.device, torch.dtype], ReadyHealing]
_ready: WeakKeyDictionary[Healing, WeakKeyDictionary[PreTrainedModel, _Made]] = WeakKeyDictionary()
_making_ready = threading.Lock()


AnyHealing = Healing | ReadyHealing | None
"""What a shortened plan runs with; None for nothing."""


def ready(healing: AnyHealing, model: PreTrainedModel) -> ReadyHealing | None:
    """The healing as `model` runs with it; see `Healing.ready`."""
    return healing.ready(model) if isinstance(healing, Healing) else healing


def healing_digest(healing: ReadyHealing | None, plan: LayerPlan) -> str:
    """The digest of the healing that `plan` runs with; empty for none, and for the full plan."""
    return "" if healing is None or plan.is_full else healing.digest


def check_head(healing: ReadyHealing | None, plan: LayerPlan) -> None:
    """Raises PlanError for the full depth with an exit head where the healing has none for it."""
    if plan.healed and (healing is None or plan.n_layers not in healing.bridges.get(plan, {})):
        raise PlanError(
            f"plan {plan} is the full depth with an exit head, and no healing with this head is given; give the "
            f"allocator's, apply_plan(model, plan, allocator.healing), or run the model as it is: 0-{plan.n_layers - 1}"
        )
