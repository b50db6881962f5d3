"""The gate that knows the answer: leave at the first layer whose prediction is the last layer's.

Source: the oracle of Shan et al. 2024 (arXiv 2412.01455). It takes all layers to know, so it saves nothing: it shows
what a gate could save.
"""

from __future__ import annotations

import torch

from token_exits.gates.base import Candidate, Gate


class Oracle(Gate):
    """1 where leaving gives the last layer's prediction, of the whole vocabulary, else 0."""

    name = "oracle"
    looks_ahead = True

    def confidence(self, candidate: Candidate) -> torch.Tensor:
        assert candidate.last is not None, "the driver tells gates that look ahead the last prediction"
        return (candidate.heads.predictions(candidate.output) == candidate.last).float()
