"""Settings of healing parts; importing them does not import torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Form = Literal["full", "low_rank"]
"""Form of a bridge: one matrix, or a product of two narrow matrices."""

Where = Literal["all", "beside_gaps", "nowhere"]
"""Layers whose matrices an adapter changes: all after the probe, those next to a gap, or none."""


@dataclass(frozen=True, slots=True)
class DistillSettings:
    """Settings of self-distillation.

    Attributes:
        where: see `Where`; with `nowhere` only the bridges are trained.
        rank: rank of the LoRA matrices.
        epochs: passes over the training examples.
        minutes: duration of training, in place of `epochs`. A few timed steps at the start fix the number of steps.
        batch_tokens: tokens of a training step, padding included.
        plans_per_step: number of plans that run at a step, at least 1.
        learning_rate, bridge_learning_rate: peak learning rates of AdamW, for the adapter and for the bridges.
        vocabulary: number of tokens beside the likely ones that enter a step's distributions; others are left out.
        evaluate_every: steps between evaluations on the held-out examples; each evaluation writes a checkpoint.
        patience: evaluations in a row without a lower loss after which training stops.
        held: share of the examples that is held out.
        seed: seed of all random draws.
    """

    where: Where = "all"
    rank: int = 16
    epochs: float = 1.0
    minutes: float | None = None
    batch_tokens: int = 1024
    plans_per_step: int = 3
    learning_rate: float = 3e-4
    bridge_learning_rate: float = 2e-4
    vocabulary: int = 8192
    evaluate_every: int = 25
    patience: int = 4
    held: float = 0.1
    seed: int = 0
