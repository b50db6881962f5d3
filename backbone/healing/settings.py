"""How healing parts are made, in names and numbers alone: a configuration is checked without loading torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Form = Literal["full", "low_rank"]
"""Of a bridge: one matrix, or a product of two narrow ones."""

Where = Literal["all", "beside_gaps", "nowhere"]
"""Weights that an adapter changes: all matrices, those of the layers next to a gap, or none."""


@dataclass(frozen=True, slots=True)
class DistillSettings:
    """How to train.

    Attributes:
        where: weights that the adapter changes; with `nowhere` the bridges alone are trained.
        rank: of the LoRA matrices.
        epochs: passes over the examples.
        minutes: to train for, instead of epochs: the rate of the first steps says once how many steps that is.
        batch_tokens: tokens of a step, padding included.
        plans_per_step: how many plans run at a step, at least 1.
        learning_rate, bridge_learning_rate: of AdamW, at their highest.
        vocabulary: tokens, beside the likely ones, that a step's distributions range over; the others are left out.
        evaluate_every: steps between looks at the held examples and checkpoints.
        patience: looks without a better loss after which training stops.
        held: share of the examples that is held out.
        seed: of everything random.
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
