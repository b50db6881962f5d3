"""Fit bridges by weighted ridge regression, from sums over tokens.

With x the state before a gap and y the state after it, a bridge predicts the residual y - x from x. A token has the
weight 1 / mean(y^2), or 0 where y is 0: the next layer, or the head, normalises the state, so errors matter relative
to its size. Without weights a few tokens with huge states (attention sinks) would dominate the fit. The states are not
kept.

Shapes: `T` tokens, `D` hidden size, `r` rank. Sums are float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from backbone.errors import UnsupportedModelError
from backbone.healing.healing import Bridge
from backbone.healing.settings import Form

RIDGES = tuple(10.0**power for power in range(-9, 0))
"""Ridge strengths tried, as shares of the mean square of the inputs."""


class Moments:
    """Sums over tokens, enough to fit any bridge of one gap and to compute its error.

    Attributes:
        inputs: sum of weighted x x^T, with a constant 1 appended to x [D + 1, D + 1].
        cross: sum of weighted x (y - x)^T [D + 1, D].
        residual: sum of weighted |y - x|^2.
        tokens: how many tokens were added.
    """

    def __init__(self, hidden_size: int, device: torch.device) -> None:
        self.inputs = torch.zeros(hidden_size + 1, hidden_size + 1, dtype=torch.float64, device=device)
        self.cross = torch.zeros(hidden_size + 1, hidden_size, dtype=torch.float64, device=device)
        self.residual = 0.0
        self.tokens = 0

    def add(self, before: torch.Tensor, after: torch.Tensor) -> None:
        """Add tokens by their states before and after the gap, each [T, D]."""
        x, y = before.double(), after.double()
        weight = y.pow(2).mean(-1, keepdim=True).rsqrt()
        weight = torch.where(weight.isinf(), 0.0, weight)  # of a state of zeros, which no error is relative to
        weighted = torch.cat([x * weight, weight], dim=-1)
        residual = (y - x) * weight
        self.inputs += weighted.T @ weighted
        self.cross += weighted.T @ residual
        self.residual += float(residual.pow(2).sum())
        self.tokens += int(weight.count_nonzero())

    def merge(self, other: Moments) -> None:
        """Add the sums of another object."""
        self.inputs += other.inputs.to(self.inputs.device)
        self.cross += other.cross.to(self.cross.device)
        self.residual += other.residual
        self.tokens += other.tokens

    def error(self, solution: torch.Tensor) -> float:
        """Mean squared error of a solution [D + 1, D], relative to the mean square of y."""
        explained = 2 * (solution * self.cross).sum() - ((self.inputs @ solution) * solution).sum()
        return (self.residual - float(explained)) / max(self.tokens * solution.shape[1], 1)


@dataclass(frozen=True, slots=True)
class Fit:
    """One fitted bridge.

    Attributes:
        bridge: the map, in float32.
        form: of the bridge; `low_rank` also where the tokens were too few for `full`.
        ridge: the strength chosen.
        error: mean squared error on the held-out tokens, relative to the mean square of the state.
        skipping_error: the same error without a bridge.
        tokens: number of tokens that the bridge was fitted on.
    """

    bridge: Bridge
    form: Form
    ridge: float
    error: float
    skipping_error: float
    tokens: int


TOKENS_PER_INPUT = 2
"""A full-rank bridge needs this many tokens for each of its D inputs; with fewer it is fitted at a low rank."""


def fit_bridge(fitted: Moments, held: Moments, form: Form, rank: int) -> Fit:
    """Fit one bridge, with the ridge strength of the smallest error on held-out tokens.

    Args:
        fitted, held: sums over the tokens to fit on, and over the held-out tokens.
        form: `full`, or `low_rank`, a product of two matrices. Too few tokens for `full` give `low_rank`, see `Fit`.
        rank: r of the form `low_rank`; lowered to half the number of tokens, or to D, where that is less.

    Raises:
        UnsupportedModelError: the states are not finite.
    """
    size = fitted.cross.shape[1]
    if form == "full" and fitted.tokens < TOKENS_PER_INPUT * size:
        form = "low_rank"
    rank = max(1, min(rank, size, fitted.tokens // TOKENS_PER_INPUT))
    best: tuple[float, float, torch.Tensor] | None = None
    for ridge in RIDGES:
        solution = _solve(fitted, ridge, None if form == "full" else rank)
        if solution is None:
            continue
        error = held.error(solution)
        if math.isfinite(error) and (best is None or error < best[0]):
            best = (error, ridge, solution)
    if best is None:
        raise UnsupportedModelError("no bridge can be fitted: hidden states are not finite; load the model in float32")
    error, ridge, solution = best
    skipping_error = held.error(torch.zeros_like(solution))
    return Fit(_as_bridge(solution, form, rank), form, ridge, error, skipping_error, fitted.tokens)


def _solve(moments: Moments, ridge: float, rank: int | None) -> torch.Tensor | None:
    """Solve the ridge regression [D + 1, D], at a rank where one is given.

    A rank makes it a reduced-rank regression (Izenman 1975, Reduced-rank regression for the multivariate linear model):
    the singular value decomposition of the predictions is truncated. None where the ridge is too small for a positive
    definite matrix.
    """
    size = moments.cross.shape[1]
    inputs = moments.inputs.clone()
    inputs.diagonal()[:size].add_(ridge * float(moments.inputs.diagonal()[:size].mean()))
    lower, failed = torch.linalg.cholesky_ex(inputs)
    if failed or not torch.isfinite(lower).all():
        return None
    solution = torch.cholesky_solve(moments.cross, lower)
    if rank is None:
        return solution
    left, values, right = torch.linalg.svd(lower.T @ solution, full_matrices=False)
    predictions = left[:, :rank] * values[:rank] @ right[:rank]
    truncated: torch.Tensor = torch.linalg.solve_triangular(lower.T, predictions, upper=True)
    return truncated


def _as_bridge(solution: torch.Tensor, form: Form, rank: int) -> Bridge:
    weight, bias = solution[:-1], solution[-1].float()
    if form == "full":
        return Bridge((weight.float().contiguous(),), bias)
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    scale = values[:rank].sqrt()
    factors = ((left[:, :rank] * scale).float().contiguous(), (scale[:, None] * right[:rank]).float().contiguous())
    return Bridge(factors, bias)
