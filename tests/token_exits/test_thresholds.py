"""Thresholds and decay, against cases that can be counted."""

import pytest
import torch
from exit_observation import mean_depth
from tiny import tiny_model

from token_exits.gates import Constant, Oracle
from token_exits.heads import ExitHeads, TokenExitsError
from token_exits.settings import NEVER, ExitSettings
from token_exits.thresholds import agreement, exits_at, threshold_for

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
