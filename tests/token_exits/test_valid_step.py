"""The certificate of a threshold holds as often as it says, where the truth is known."""

import numpy as np
import pytest

from token_exits.thresholds import valid_step

STEPS = np.array([0.02, 0.04, 0.06, 0.09, 0.12, 0.2])
"""Share of prompts that lose their answer at each threshold: the true risk."""


def drawn(generator: np.random.Generator, n: int) -> np.ndarray:
    """0/1 losses [T, n] that grow from step to step, as when ever more tokens leave."""
    return (generator.random(n) < STEPS[:, None]).astype(float)


@pytest.mark.parametrize("risk", ["insufficient", "score_lost", "mean_score"])
def test_bound_holds_in_500_redrawn_calibration_sets(risk: str) -> None:
    alpha, delta, generator = 0.08, 0.1, np.random.default_rng(0)
    found = [
        valid_step(drawn(generator, 300), np.ones(300), alpha=alpha, delta=delta, risk=risk)  # type: ignore[arg-type]
        for _ in range(500)
    ]
    broken = np.mean([step is not None and STEPS[step] > alpha for step in found])
    assert broken <= delta
    assert np.mean([step is not None and step >= 1 for step in found]) > 0.5  # and it is of use


def test_nothing_leaves_where_nothing_is_valid() -> None:
    losses = np.ones((3, 50))
    terms = {"alpha": 0.05, "delta": 0.1, "risk": "insufficient"}
    assert valid_step(losses, np.ones(50), **terms) is None
    for leaves, step in (([False, False, True], 2), ([False, False, False], None)):
        assert valid_step(0 * losses, np.ones(50), **terms, shortens=np.array(leaves)) == step
