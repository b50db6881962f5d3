"""Thresholds and decay, against cases that can be counted."""

import numpy as np
import pytest
import torch
from exit_observation import mean_depth
from tiny import tiny_model

from token_exits.gates import Constant, Oracle
from token_exits.heads import ExitHeads, TokenExitsError
from token_exits.settings import NEVER, ExitSettings
from token_exits.thresholds import agreement, exits_at, threshold_for, valid_step

CONFIDENCE = torch.tensor([[0.9, 0.2, 0.5, 0.1], [0.3, 0.8, 0.6, 0.2]])
AGREES = torch.tensor([[True, False, False, False], [True, True, False, True]])


def test_tokens_leave_at_the_first_layer_that_is_sure() -> None:
    assert exits_at(CONFIDENCE, 0.5).tolist() == [0, 1, 0, 2]
    assert agreement(CONFIDENCE, AGREES, 0.5) == 0.75
    assert mean_depth(CONFIDENCE, [2, 4], 6, 0.5) == (2 + 4 + 2 + 6) / 4


@pytest.mark.parametrize(("wanted", "threshold"), [(1.0, 0.8), (0.75, 0.3), (0.5, 0.2), (0.0, 0.1)])
def test_threshold_keeps_the_wanted_agreement(wanted: float, threshold: float) -> None:
    found = threshold_for(CONFIDENCE, AGREES, wanted)
    assert agreement(CONFIDENCE, AGREES, found) >= wanted
    assert torch.equal(exits_at(CONFIDENCE, found), exits_at(CONFIDENCE, threshold))


def test_no_threshold_where_the_surest_are_wrong() -> None:
    assert threshold_for(torch.tensor([[0.9, 0.1]]), torch.tensor([[False, True]]), 0.9) == NEVER


def settings(**options: object) -> ExitSettings:
    fields = {"gate": Constant(1.0), "depths": (2,), "threshold": 0.5, **options}
    return ExitSettings(heads=ExitHeads(tiny_model("llama")), **fields)  # type: ignore[arg-type]


def test_decaying_thresholds_come_down_along_the_answer() -> None:
    decaying = settings(decay=4.0)
    along = [decaying.threshold_at(step, 20) for step in range(1, 21)]
    assert along == sorted(along, reverse=True)
    assert along[0] > 0.5 > along[-1] > 0.45
    assert settings().threshold_at(3, 20) == 0.5
    assert settings(threshold=NEVER, decay=4.0).threshold_at(3, 20) == NEVER


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"depths": ()}, "at least one"),
        ({"depths": (4, 2)}, "ascend"),
        ({"depths": (0, 2)}, "layers 1 to 5"),
        ({"depths": (6,)}, "layers 1 to 5"),
        ({"strategy": "guess"}, "propagate, share, recompute"),
        ({"threshold": -0.1}, "threshold must be a number from 0, got -0.1"),
        ({"threshold": float("nan")}, "threshold must be a number from 0, got nan"),
        ({"decay": -1.0}, "decay must be a number from 0"),
        ({"gate": Oracle(), "strategy": "recompute"}, "nothing to recompute"),
    ],
)
def test_impossible_settings_are_refused(options: dict[str, object], words: str) -> None:
    with pytest.raises(TokenExitsError, match=words):
        settings(**options)


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
