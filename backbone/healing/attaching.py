"""Healing: the bridges and the adapter that make a shortened plan better, attached to a model, saved and loaded."""

from __future__ import annotations

import copy
import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from backbone.errors import ArtefactError, PlanError, WrongModelError
from backbone.families import decoder_layers, sublayer_bytes
from backbone.fingerprint import model_fingerprint
from backbone.healing.adapters import Adapter, LowRank
from backbone.healing.bridges import Bridge, Bridges
from backbone.plan import LayerPlan
from backbone.strict_json import parse

FORMAT_VERSION = 1


@dataclass(frozen=True, eq=False)
class Healing:
    """Bridges and an adapter for the shortened plans of one model. The full plan never sees them.

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

    def save(self, path: Path) -> None:
        """One safetensors file."""
        described = {"version": FORMAT_VERSION, "fingerprint": self.fingerprint}
        # Plans with one gap in common may share its bridge, and safetensors refuses tensors that share memory.
        tensors = {name: tensor.clone() for name, tensor in self.tensors().items()}
        save_file(tensors, path, {"layerbudget": json.dumps(described)})

    @classmethod
    def load(cls, path: Path) -> Healing:
        """Raises ArtefactError: no such file, or one that holds something else."""
        try:
            with safe_open(path, "pt") as file:
                described = parse((file.metadata() or {})["layerbudget"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            if described["version"] != FORMAT_VERSION or not isinstance(described["fingerprint"], str):
                raise ValueError(f"format {described['version']!r:.80}, this version reads {FORMAT_VERSION}")
            return cls(described["fingerprint"], *_from_tensors(tensors))
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ArtefactError(f"{path} holds no healing parts: {error}") from None

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


def _from_tensors(tensors: Mapping[str, torch.Tensor]) -> tuple[Bridges, Adapter | None]:
    """What `Healing.tensors` wrote. Raises ValueError for other names or shapes, or numbers that are not finite."""
    owners: dict[tuple[str, ...], dict[str, torch.Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
            raise ValueError(f"the tensor {name!r:.80} holds numbers that are not finite, or no fractions")
        *owner, part = name.split("|")
        owners[tuple(owner)][part] = tensor
    bridges: dict[LayerPlan, dict[int, Bridge]] = defaultdict(dict)
    changes = {}
    for key, named in owners.items():
        match key:
            case ("bridge", n_layers, text, first):
                plan = LayerPlan.parse(text, int(n_layers))
                bridges[plan][int(first)] = _checked_bridge(plan, int(first), named)
            case ("change", parameter):
                changes[parameter] = _checked_change(parameter, named)
            case _:
                raise ValueError(f"{'|'.join([*key, *named])!r:.80} is no name of a tensor of healing parts")
    return dict(bridges), Adapter(changes) if changes else None


def _checked_bridge(plan: LayerPlan, first: int, named: Mapping[str, torch.Tensor]) -> Bridge:
    """A bias [D], and one matrix [D, D] or two, [D, r] and [r, D]."""
    if first not in ({plan.n_layers} if plan.healed else {gap.start for gap in plan.gaps}):
        raise ValueError(f"a bridge stands at layer {first}, where the plan {plan} has no gap")
    shapes = {name: tuple(tensor.shape) for name, tensor in named.items()}
    match [shapes.pop(name, None) for name in ("bias", "factor_0", "factor_1")]:
        case [(size,), (rows, columns), None] if rows == columns == size and not shapes:
            pass
        case [(size,), (rows, r), (s, columns)] if rows == columns == size and r == s and not shapes:
            pass
        case _:
            all_shapes = {name: tuple(tensor.shape) for name, tensor in named.items()}
            raise ValueError(f"the bridge of the plan {plan} at layer {first} has parts of shapes {all_shapes}")
    return Bridge.from_tensors(named)


def _checked_change(parameter: str, named: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    both = named.keys() == {"0", "1"} and all(factor.dim() == 2 for factor in named.values())
    if not both or named["0"].shape[1] != named["1"].shape[0]:
        raise ValueError(f"the change of {parameter!r:.80} should be two matrices to multiply")
    return named["0"], named["1"]


@dataclass(frozen=True, slots=True)
class Swap:
    """A linear layer with another weight while a shortened plan runs: `forward` takes the place of its own.

    Where only some rows run shortened plans, `change` says what the other weight adds to the output: inputs [.., in] ->
    [.., out].
    """

    module: nn.Module
    forward: Callable[..., Any]
    change: LowRank


@dataclass(frozen=True, slots=True, eq=False)
class Attached:
    """Healing parts made ready for a model: on its devices, in its dtype, merged.

    Attributes:
        digest: of the healing parts.
        bridges: see `Healing`.
        swaps: the modules that compute with other weights.
        changed: the layers whose weights are not the full plan's.
    """

    digest: str
    bridges: Bridges
    swaps: tuple[Swap, ...] = ()
    changed: frozenset[int] = frozenset()


_ATTACHED = "_layerbudget_healing"


def attach(model: PreTrainedModel, healing: Healing) -> None:
    """From now on `apply_plan` runs the shortened plans of `model` with these, in place of any attached before.

    Without a plan and under the full one the model is unchanged, bit for bit.

    Raises:
        WrongModelError: they were made for another model.
        ArtefactError: they are for states of another size.
        UnsupportedModelError: the model's weights cannot be changed, for example since they are quantised.
    """
    if (found := model_fingerprint(model)) != healing.fingerprint:
        raise WrongModelError(f"these healing parts were made for {healing.fingerprint}, the model given is {found}")
    layers, hidden = decoder_layers(model), model.config.get_text_config().hidden_size
    bridges_given = [bridge for of_plan in healing.bridges.values() for bridge in of_plan.values()]
    if wrong := [len(bridge.bias) for bridge in bridges_given if len(bridge.bias) != hidden]:
        raise ArtefactError(f"this healing is for states of {wrong[0]} numbers, those of this model have {hidden}")
    devices = [next(layer.parameters()).device for layer in layers]
    bridges = {
        plan: {first: bridge.to(devices[min(first, len(layers) - 1)], model.dtype) for first, bridge in of_plan.items()}
        for plan, of_plan in healing.bridges.items()
    }
    merged = {} if healing.adapter is None else healing.adapter.merged(model)
    changes = {} if healing.adapter is None else healing.adapter.low_rank(merged)
    digest = "" if healing.is_empty else healing.digest
    swaps = tuple(
        _swap(model.get_submodule(name.removesuffix(".weight")), merged[name], changes[name]) for name in merged
    )
    set_attached(model, Attached(digest, bridges, swaps, changed_layers(model, merged)))


def _swap(module: nn.Module, weight: nn.Parameter, change: LowRank) -> Swap:
    """The module's own code on a shallow copy with another weight; other threads may be running the module."""
    twin = copy.copy(module)
    twin.__dict__["_parameters"] = {**module._parameters, "weight": weight}
    return Swap(module, partial(type(module).forward, twin), change)


def changed_layers(model: PreTrainedModel, parameters: Collection[str]) -> frozenset[int]:
    """The layers that parameters of these names belong to."""
    owners = {id(model.get_submodule(name.rpartition(".")[0])) for name in parameters}
    layers = enumerate(decoder_layers(model))
    return frozenset(index for index, layer in layers if any(id(module) in owners for module in layer.modules()))


def set_attached(model: PreTrainedModel, attached: Attached) -> None:
    model.__dict__[_ATTACHED] = attached


def detach(model: PreTrainedModel) -> None:
    """Shortened plans of `model` run frozen again."""
    model.__dict__.pop(_ATTACHED, None)


def attached_to(model: PreTrainedModel, plan: LayerPlan) -> Attached | None:
    """The healing parts that `plan` runs with; None for the full plan, and where nothing is attached."""
    return None if plan.is_full else model.__dict__.get(_ATTACHED)


def check_head(model: PreTrainedModel, plan: LayerPlan) -> None:
    """Raises PlanError for the full depth with an exit head where the model has none attached."""
    if not plan.healed:
        return
    attached = attached_to(model, plan)
    if attached is None or plan.n_layers not in attached.bridges.get(plan, {}):
        raise PlanError(
            f"plan {plan} is the full depth with an exit head, and none is attached to this model; attach the "
            f"allocator's, or run the model as it is: 0-{plan.n_layers - 1}"
        )


def attached_digest(model: PreTrainedModel, plan: LayerPlan) -> str:
    """The digest of the healing parts that `plan` runs with; empty for none."""
    attached = attached_to(model, plan)
    return "" if attached is None else attached.digest
