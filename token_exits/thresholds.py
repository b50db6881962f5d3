"""The threshold of a gate: what it would do to held-out tokens, and the lowest one that keeps a wanted agreement.

Empirical, a token at a time, as in Valade 2024 (arXiv 2407.21082): no guarantee. `valid_step` gives one: it tests such
thresholds on whole answers.

Shapes: `T` tokens, `C` candidate layers, `n` calibration prompts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from controller.certificate.calibration import last_valid, price_p_values
from controller.certificate.groups import Names
from controller.certificate.risks import Risk
from token_exits.settings import NEVER

STEPS = 256
"""Thresholds tried: so many quantiles of the confidences seen."""


def exits_at(confidence: torch.Tensor, threshold: float) -> torch.Tensor:
    """At which candidate layer each token leaves [T], as a place in [0, C], C for none, from confidences [C, T]."""
    sure = confidence >= threshold
    first: torch.Tensor = sure.float().argmax(dim=0)
    return torch.where(sure.any(dim=0), first, len(confidence))


def kept(confidence: torch.Tensor, agrees: torch.Tensor, threshold: float) -> float:
    """Share of the tokens with the full model's next token; those that do not leave have it."""
    places = exits_at(confidence, threshold)
    whole = torch.cat([agrees, torch.ones_like(agrees[:1])])
    return float(whole.gather(0, places[None]).float().mean())


def mean_depth(confidence: torch.Tensor, depths: Sequence[int], n_layers: int, threshold: float) -> float:
    """Layers that a token runs, on average."""
    return float(
        torch.tensor([*depths, n_layers]).to(confidence.device)[exits_at(confidence, threshold)].float().mean()
    )


def threshold_for(confidence: torch.Tensor, agrees: torch.Tensor, wanted: float) -> float:
    """The lowest threshold at which, and at all higher ones tried, the share `wanted` of the tokens is kept.

    Args:
        confidence, agrees: of held-out tokens at each candidate layer [C, T].

    Returns:
        `NEVER` where no threshold keeps so many.
    """
    tried = torch.quantile(confidence.flatten().double(), torch.linspace(1, 0, STEPS, dtype=torch.float64))
    found = NEVER
    for threshold in sorted({*tried.tolist()}, reverse=True):
        if kept(confidence, agrees, threshold) < wanted:
            break
        found = threshold
    return found


def valid_step(
    losses: NDArray[np.float64],
    full: NDArray[np.float64],
    *,
    alpha: float,
    delta: float,
    risk: Risk,
    groups: Names | None = None,
    shortens: NDArray[np.bool_] | None = None,
) -> int | None:
    """The place of the boldest threshold whose mean loss is at most `alpha` with probability 1 - `delta`; None, and
    then no token leaves, where already the safest fails or where no token leaves at that threshold.

    Learn-then-Test along thresholds that were set on other prompts (CALM, Schuster et al. 2022, arXiv 2207.07061,
    section 4): the first one that fails ends the test, so that the choice among them is covered by delta.

    Args:
        losses: of answers under each threshold, safest first [thresholds, n].
        full: the full model's scores [n].
        alpha, delta, risk, groups: as in `controller.certificate.calibration.valid_price`.
        shortens: whether any token leaves at each threshold; None where some does at all of them.
    """
    index = last_valid(price_p_values(losses, alpha, delta, risk, full=full, groups=groups), delta)
    return None if index is None or not (shortens is None or shortens[index]) else index
