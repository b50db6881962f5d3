"""Thresholds of gates, empirical or certified.

`threshold_for` is empirical, token by token, as in Valade 2024 (arXiv 2407.21082). `valid_step` tests such thresholds
on whole answers.

Shapes: `T` tokens, `C` candidate layers, `n` calibration prompts.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from controller.certificate.calibration import last_valid, price_p_values
from controller.certificate.risks import Names, Risk
from token_exits.settings import NEVER

STEPS = 256
"""Thresholds tried: quantiles of the confidences."""


def exits_at(confidence: torch.Tensor, threshold: float) -> torch.Tensor:
    """Place of the candidate layer where each token leaves [T], C for none."""
    leaves = confidence >= threshold
    first: torch.Tensor = leaves.float().argmax(dim=0)
    return torch.where(leaves.any(dim=0), first, len(confidence))


def agreement(confidence: torch.Tensor, agrees: torch.Tensor, threshold: float) -> float:
    """Share of the tokens with the full model's next token."""
    places = exits_at(confidence, threshold)
    whole = torch.cat([agrees, torch.ones_like(agrees[:1])])
    return float(whole.gather(0, places[None]).float().mean())


def threshold_for(confidence: torch.Tensor, agrees: torch.Tensor, wanted: float) -> float:
    """The lowest threshold from which on the agreement is at least `wanted`.

    Args:
        confidence, agrees: of held-out tokens at each candidate layer [C, T].

    Returns:
        `NEVER` where no threshold suffices.
    """
    tried = torch.quantile(confidence.flatten().double(), torch.linspace(1, 0, STEPS, dtype=torch.float64))
    found = NEVER
    for threshold in sorted({*tried.tolist()}, reverse=True):
        if agreement(confidence, agrees, threshold) < wanted:
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
    """Place of the lowest threshold with a certified mean loss of at most `alpha`.

    Learn-then-Test along thresholds that were set on other prompts (CALM, Schuster et al. 2022, arXiv 2207.07061,
    section 4): the first that fails ends the test, so `delta` covers the choice among them.

    Args:
        losses: of answers under each threshold, safest first [thresholds, n].
        full: the full model's scores [n].
        alpha, delta, risk, groups: as in `controller.certificate.calibration.valid_price`.
        shortens: whether any token leaves at each threshold; None where some does at all of them.

    Returns:
        None, and then no token leaves, where the safest fails or no token leaves at the lowest valid one.
    """
    index = last_valid(price_p_values(losses, alpha, delta, risk, full=full, groups=groups), delta)
    return None if index is None or not (shortens is None or shortens[index]) else index
