"""Gates that read the distribution over the next token: top probability, margin, entropy, patience.

Sources: CALM, Schuster et al. 2022 (arXiv 2207.07061, section 3.5): the softmax response is the difference of the two
top probabilities; entropy: BranchyNet, Teerapittayanon et al. 2016, and Valade 2024 (arXiv 2407.21082); patience:
PABEE, Zhou et al. 2020 (arXiv 2006.04152).
"""

from __future__ import annotations

import math

import torch

from token_exits.gates.base import Candidate, Gate


class TopProbability(Gate):
    """The largest probability."""

    name = "top"

    def confidence(self, candidate: Candidate) -> torch.Tensor:
        logits = candidate.logits
        return (logits.amax(-1) - logits.logsumexp(-1)).exp().clamp(max=1.0)


class Margin(Gate):
    """The difference of the two largest probabilities."""

    name = "margin"

    def confidence(self, candidate: Candidate) -> torch.Tensor:
        logits = candidate.logits
        top = (logits.topk(2, dim=-1).values - logits.logsumexp(-1, keepdim=True)).exp()
        return (top[:, 0] - top[:, 1]).clamp(0.0, 1.0)


class Entropy(Gate):
    """1 less the entropy, as a share of the largest that there is."""

    name = "entropy"

    def confidence(self, candidate: Candidate) -> torch.Tensor:
        logs = candidate.logits.log_softmax(-1)
        entropy = -(logs.exp() * logs).sum(-1)
        return (1.0 - entropy / math.log(logs.shape[-1])).clamp(0.0, 1.0)


class Patience(Gate):
    """For how many candidate layers in a row the prediction has been the same: n of them give n / (n + 1), 0 at
    first."""

    name = "patience"

    def confidence(self, candidate: Candidate) -> torch.Tensor:
        top, rows, memory = candidate.top, candidate.rows, candidate.memory
        if not memory:
            memory["top"] = top.new_full((candidate.n_rows,), -1)
            memory["streak"] = top.new_zeros(candidate.n_rows)
        top = torch.where(candidate.logits.isfinite().all(-1), top, -2)  # what is no number is no prediction
        same = (memory["top"][rows] == top) & (top >= 0)
        streak = torch.where(same, memory["streak"][rows] + 1, 0)
        memory["top"][rows], memory["streak"][rows] = top, streak
        return streak / (streak + 1.0)
