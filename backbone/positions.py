"""Position ids of left-padded prompts, for calls that do not go through `generate()`."""

from __future__ import annotations

import inspect

import torch
from torch import nn


def position_inputs(module: nn.Module, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """`position_ids` [B, S] as `generate()` gives them, as a keyword argument of `module`; empty if it takes none."""
    if "position_ids" not in inspect.signature(module.forward).parameters:
        return {}
    return {"position_ids": (attention_mask.long().cumsum(-1) - 1).clamp(min=0)}
