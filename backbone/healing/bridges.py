"""Bridges: affine maps that replace the layers that a plan skips.

A bridge maps the state before a gap of a plan to about the state after it (Din et al. 2023, arXiv 2303.09435, section
3; ReplaceMe, Shopkhoev et al. 2025, arXiv 2505.02819, section 3).

Shapes: `T` tokens, `D` hidden size, `r` rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

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
