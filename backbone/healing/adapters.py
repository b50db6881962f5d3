"""Adapters: small changes of some weights that all shortened plans share; the full plan keeps its own weights.

A change is a low-rank product, LoRA (Hu et al. 2021, arXiv 2106.09685, section 4). It is merged into a copy of the
weight, so that an adapted layer costs no more time than any other, at the price of one more copy of the adapted weights
in memory, however many plans use it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from backbone.errors import UnsupportedModelError

LowRank = Callable[[torch.Tensor], torch.Tensor]
"""What a change of a matrix adds to its output: inputs [.., in] -> [.., out]."""


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

    def low_rank(self, merged: Mapping[str, nn.Parameter]) -> dict[str, LowRank]:
        """By parameter name, what each changed matrix adds, in the dtype and on the device of its merged copy."""
        return {
            name: _low_rank(*(factor.to(merged[name].device, merged[name].dtype) for factor in factors))
            for name, factors in self.changes.items()
        }

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


def _low_rank(up: torch.Tensor, down: torch.Tensor) -> LowRank:
    return lambda inputs: (inputs @ down.T) @ up.T
