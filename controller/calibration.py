"""A threshold with a guarantee: Learn-then-Test on the calibrate split, and the certificate that says what it means.

Source: Angelopoulos et al. 2021, Learn then Test (arXiv 2110.01052), sections 2 and 3.2; fixed-sequence testing as in
CALM (Schuster et al. 2022, arXiv 2207.07061, section 4). P-values and the test are MAPIE's.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

THRESHOLDS: Floats = 1.0 / (1.0 + np.exp(-np.linspace(9.0, -9.0, 145)))
"""Probabilities to demand, safest first. Fixed before any data is seen, as the test requires."""

MAX_PROMPTS = 10_000_000


@dataclass(frozen=True, slots=True)
class Certificate:
    """What the calibrate split supports: with probability at least 1 - `delta`, the risk is at most `alpha`.

    Attributes:
        risk: what is bounded.
        alpha: the bound.
        delta: how often the bound may fail, over draws of the calibration prompts.
        n: calibration prompts.
        threshold: probability that a plan must reach to be chosen; None where no threshold is valid.
        observed_risk: on the calibration prompts, at the threshold (0 where there is none).
        prompts_hash: of the calibration prompts.
        date: when it was made, ISO 8601.
        fewest_prompts: below this many calibration prompts no threshold can be valid at `alpha` and `delta`.
    """

    risk: str
    alpha: float
    delta: float
    n: int
    threshold: float | None
    observed_risk: float
    prompts_hash: str
    date: str
    fewest_prompts: int

    @property
    def sentence(self) -> str:
        """The certificate in one plain sentence."""
        if self.threshold is None:
            return (
                f"No threshold could be certified: {self.n} calibration prompts do not show, with {1 - self.delta:.0%} "
                f"confidence, that at most {self.alpha:.1%} of prompts would lose quality, so all run the full model."
            )
        return (
            f"With {1 - self.delta:.0%} confidence, at most {self.alpha:.1%} of prompts like the {self.n} calibration "
            f"prompts get an answer that scores lower than the full model's (observed: {self.observed_risk:.1%})."
        )

    def save(self, path: Path) -> None:
        path.write_text(json.dumps({**asdict(self), "sentence": self.sentence}, indent=2) + "\n")

    @classmethod
    def load(cls, path: Path) -> Certificate:
        data = json.loads(path.read_text())
        data.pop("sentence")
        return cls(**data)


def valid_threshold(losses: Callable[[float], Floats], alpha: float, delta: float) -> float | None:
    """The lowest threshold whose risk is at most `alpha` with probability 1 - `delta`, or None.

    Args:
        losses: threshold -> loss, 0 or 1, of each of the n calibration prompts under the plans it chooses.
        alpha: bound on the mean loss.
        delta: family-wise error rate over all thresholds.
    """
    from mapie.risk_control import FWERFixedSequenceTesting, control_fwer

    samples = [losses(float(threshold)) for threshold in THRESHOLDS]
    risks = np.array([sample.mean() for sample in samples])
    valid = control_fwer(p_values(risks, len(samples[0]), alpha), delta, FWERFixedSequenceTesting(n_starts=1))
    return float(THRESHOLDS[valid[-1]]) if len(valid) else None


def p_values(risks: Floats, n: int, alpha: float) -> Floats:
    """Hoeffding-Bentkus p-values [T] of "the risk exceeds alpha", from observed mean 0/1 losses [T] of n prompts."""
    from mapie.risk_control.methods import compute_hoeffding_bentkus_p_value

    values: Floats = compute_hoeffding_bentkus_p_value(np.asarray(risks, dtype=float), n, alpha, binary=True)[:, 0]
    return values


def fewest_prompts(alpha: float, delta: float, observed_risk: float = 0.0) -> int:
    """How many calibration prompts it takes to certify `alpha` at `delta` when the loss observed is `observed_risk`.

    Raises:
        ValueError: the observed risk is not below alpha, so that no number suffices.
    """
    if observed_risk >= alpha:
        raise ValueError(f"an observed risk of {observed_risk:.3f} can never certify a bound of {alpha:.3f}")
    low, high = 0, math.ceil(math.log(delta) / math.log(1 - alpha))
    while not _certifies(high, alpha, delta, observed_risk):
        low, high = high, high * 2
        if high > MAX_PROMPTS:
            raise ValueError(
                f"certifying {alpha:.3f} at an observed risk of {observed_risk:.3f} takes over {MAX_PROMPTS} prompts"
            )
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if _certifies(middle, alpha, delta, observed_risk) else (middle, high)
    return high


def _certifies(n: int, alpha: float, delta: float, observed_risk: float) -> bool:
    lost = math.ceil(observed_risk * n)
    return bool(p_values(np.array([lost / n]), n, alpha)[0] <= delta)
