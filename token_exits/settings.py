"""The settings of token exits: gate, threshold, candidate layers, exit heads, KV strategy."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from backbone.families import decoder_layers
from token_exits.gates import Gate
from token_exits.heads import ExitHeads, TokenExitsError

Strategy = Literal["propagate", "share", "recompute"]
"""Keys and values of a token in layers that it did not run. `propagate`: projected from the state with which it left
(CALM). `share`: copied from the last layer of the same kind that it ran. `recompute`: deferred until a later token of
the row reaches the layer (EE-LLM, Chen et al. 2023, arXiv 2312.04916, section 3.3); then they are the full model's."""
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)

NEVER = 2.0
"""A threshold that no confidence reaches."""

DECAY_SHARE = 0.1
"""Share of a decaying threshold that decays; CALM, Schuster et al. 2022 (arXiv 2207.07061, equation 5)."""


@dataclass(frozen=True, eq=False)
class ExitSettings:
    """How tokens leave.

    Attributes:
        gate: see `Gate`.
        heads: made for the model that generates.
        depths: the candidate layers, ascending; a token may leave before each of them.
        threshold: the confidence at which a token leaves, at every layer.
        strategy: see `Strategy`.
        decay: rate at which the threshold comes down to 0.9 times its value along the answer; None for none.

    Raises:
        TokenExitsError: layers that the model lacks, an unknown strategy, a negative threshold or decay.
    """

    gate: Gate
    heads: ExitHeads
    depths: tuple[int, ...]
    threshold: float
    strategy: Strategy = "propagate"
    decay: float | None = None

    def __post_init__(self) -> None:
        depths, n_layers = self.depths, len(decoder_layers(self.heads.model))
        if not depths or sorted({*depths}) != list(depths):
            raise TokenExitsError(f"the candidate layers must ascend and be at least one, got {depths}")
        if not (depths[0] > 0 and depths[-1] < n_layers):
            raise TokenExitsError(f"tokens can leave before the layers 1 to {n_layers - 1} of this model, got {depths}")
        if self.strategy not in STRATEGIES:
            raise TokenExitsError(f"there is no strategy {self.strategy!r}; known are {', '.join(STRATEGIES)}")
        for name, value in (("threshold", self.threshold), ("decay", self.decay)):
            if value is not None and not 0 <= value < math.inf:
                raise TokenExitsError(f"{name} must be a number from 0, got {value!r}")
        if self.strategy == "recompute" and self.gate.looks_ahead:
            raise TokenExitsError(f"the gate {self.gate.name!r} runs all layers, so there is nothing to recompute")

    def threshold_at(self, step: int, steps: int) -> float:
        """The threshold of the token at place `step`, from 1, of an answer of at most `steps` tokens."""
        if self.decay is None or self.threshold >= NEVER:
            return self.threshold
        decayed = (1 - DECAY_SHARE) * self.threshold + DECAY_SHARE * math.exp(-self.decay * step / max(steps, 1))
        return min(max(decayed, 0.0), 1.0)
