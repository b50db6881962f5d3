"""The file of healing parts, checked when read, since it may be damaged or foreign."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from backbone.errors import ArtefactError
from backbone.healing.healing import Adapter, Bridge, Bridges, Healing
from backbone.plan import LayerPlan
from backbone.strict_json import parse

FORMAT_VERSION = 1


def save_healing(healing: Healing, path: Path) -> None:
    """One safetensors file."""
    described = {"version": FORMAT_VERSION, "fingerprint": healing.fingerprint}
    # Plans with one gap in common may share its bridge, and safetensors refuses tensors that share memory.
    tensors = {name: tensor.clone() for name, tensor in healing.tensors().items()}
    save_file(tensors, path, {"layerbudget": json.dumps(described)})


def load_healing(path: Path) -> Healing:
    """Raises ArtefactError: no such file, or one that holds something else."""
    try:
        with safe_open(path, "pt") as file:
            described = parse((file.metadata() or {})["layerbudget"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        if described["version"] != FORMAT_VERSION or not isinstance(described["fingerprint"], str):
            raise ValueError(f"format {described['version']!r:.80}, this version reads {FORMAT_VERSION}")
        return Healing(described["fingerprint"], *_from_tensors(tensors))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ArtefactError(f"{path} holds no healing parts: {error}") from None


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
