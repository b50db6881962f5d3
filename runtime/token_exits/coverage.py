"""How well a gate tells tokens that may leave from those that may not, at whatever threshold.

Source: area under the risk-coverage curve, Geifman et al. 2019 (arXiv 1805.08206, section 3).

Shapes: `T` tokens, `C` candidate layers.
"""

from __future__ import annotations

import torch


def risk_coverage_area(confidence: torch.Tensor, agrees: torch.Tensor) -> float:
    """Mean, over all shares of tokens let go, surest first, of the share of these that should not have been.

    Tokens of equal confidence count as if their order were drawn at random.

    Args:
        confidence, agrees: of T tokens at one layer.
    """
    order = confidence.argsort(descending=True, stable=True)
    _, sizes = confidence[order].unique_consecutive(return_counts=True)  # type: ignore[no-untyped-call]
    wrong = (~agrees[order]).double()
    means = torch.stack(
        [part.mean() for part in torch.tensor_split(wrong, sizes.cumsum(0)[:-1].tolist())]
    ).repeat_interleave(sizes)
    return float((means.cumsum(0) / torch.arange(1, len(means) + 1)).mean())


def mean_area(confidence: torch.Tensor, agrees: torch.Tensor) -> float:
    """The area, on average over the candidate layers [C, T]."""
    return sum(risk_coverage_area(c, a) for c, a in zip(confidence, agrees, strict=True)) / len(confidence)
