"""Healing parts as tensors with names, as they lie in a file, and back; what comes back is checked."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import torch

from backbone.errors import InputError
from backbone.healing.adapters import Adapter
from backbone.healing.bridges import Bridge, Bridges
from backbone.plan import LayerPlan

Tensors = Mapping[str, torch.Tensor]
_SEPARATOR = "|"


class HealingError(InputError):
    """Healing parts of another model, or a file that holds none."""


def tensors_of(bridges: Bridges, adapter: Adapter | None) -> dict[str, torch.Tensor]:
    """By name: of a bridge its plan, the first layer of its gap and the part; of a change the parameter, a number."""
    tensors = {}
    for plan, of_plan in bridges.items():
        for first, bridge in of_plan.items():
            for name, tensor in bridge.tensors().items():
                tensors[_joined("bridge", plan.n_layers, plan, first, name)] = tensor.detach().contiguous()
    for parameter, factors in (adapter.changes if adapter else {}).items():
        for index, factor in enumerate(factors):
            tensors[_joined("change", parameter, index)] = factor.detach().contiguous()
    return tensors


def from_tensors(tensors: Tensors) -> tuple[dict[LayerPlan, dict[int, Bridge]], Adapter | None]:
    """What `tensors_of` was given.

    Raises:
        HealingError: other names, shapes that do not fit, numbers that are not finite.
        PlanError: the name of a bridge holds no plan.
    """
    parts: dict[tuple[LayerPlan, int], dict[str, torch.Tensor]] = defaultdict(dict)
    factors: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
            raise HealingError(f"the tensor {name!r:.80} holds numbers that are not finite, or no fractions")
        match name.split(_SEPARATOR):
            case ["bridge", n_layers, plan, first, part]:
                parts[LayerPlan.parse(plan, _number(n_layers)), _number(first)][part] = tensor
            case ["change", parameter, index]:
                factors[parameter][index] = tensor
            case _:
                raise HealingError(f"{name!r:.80} is no name of a tensor of healing parts")
    bridges: dict[LayerPlan, dict[int, Bridge]] = defaultdict(dict)
    for (where, layer), named in parts.items():
        bridges[where][layer] = _bridge(where, layer, named)
    changes = {parameter: _change(parameter, named) for parameter, named in factors.items()}
    return dict(bridges), Adapter(changes) if changes else None


def _bridge(plan: LayerPlan, first: int, named: Tensors) -> Bridge:
    if first not in ({plan.n_layers} if plan.healed else {gap.start for gap in plan.gaps}):
        raise HealingError(f"a bridge stands at layer {first}, where the plan {plan} has no gap")
    shapes = {name: tuple(tensor.shape) for name, tensor in named.items()}
    matrices = [shapes[name] for name in ("factor_0", "factor_1") if name in shapes]
    if not _is_bridge(shapes, matrices):
        raise HealingError(f"the bridge of the plan {plan} at layer {first} has parts of shapes {shapes}")
    return Bridge.from_tensors(named)


def _is_bridge(shapes: Mapping[str, tuple[int, ...]], matrices: list[tuple[int, ...]]) -> bool:
    """Whether these are a bias [D], and one matrix [D, D] or two, [D, r] and [r, D]."""
    size = shapes.get("bias", ())
    return (
        {"factor_0", "bias"} <= shapes.keys() <= {"factor_0", "factor_1", "bias"}
        and len(size) == 1
        and all(len(matrix) == 2 for matrix in matrices)
        and (matrices[0][0], matrices[-1][1]) == size * 2
        and matrices[0][1] == matrices[-1][0]
    )


def _change(parameter: str, named: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
    both = named.keys() == {"0", "1"} and all(factor.dim() == 2 for factor in named.values())
    if not both or named["0"].shape[1] != named["1"].shape[0]:
        raise HealingError(f"the change of {parameter!r:.80} should be two matrices to multiply")
    return named["0"], named["1"]


def _number(text: str) -> int:
    if not (text.isascii() and text.isdecimal()) or len(text) > 9:
        raise HealingError(f"{text!r:.80} in the name of a bridge should be a number of layers")
    return int(text)


def _joined(*parts: object) -> str:
    return _SEPARATOR.join(str(part) for part in parts)
