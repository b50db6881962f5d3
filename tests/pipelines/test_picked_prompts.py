"""Wherever a run picks some of its prompts, it picks none of them twice, and all of them where it asks for more."""

from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest

from backbone.errors import InputError
from pipelines.config import load_config
from pipelines.evaluation.examples import shown_rows
from pipelines.evaluation.speed import timed_rows
from pipelines.run import runner
from pipelines.run.runner import run_one
from pipelines.run.workspace import Workspace
from pipelines.stages import adapt
from pipelines.stages.menu import _parts


@pytest.mark.parametrize("method", ["both", "best"])
@pytest.mark.parametrize("wanted", [8, 400])
def test_adapt_fits_on_every_prompt_once(config_file, method, wanted) -> None:
    config = load_config(
        config_file(
            menu={"method": "exits", "probe_depth": 2, "plans": 3},
            adapt={"method": method, "prompts": wanted, "references": False},
        )
    )
    run_one(config, "menu")
    given = {}

    def fitted(model, sequences, *rest, **options):
        given["bridges"] = sequences
        return fit_bridges(model, sequences, *rest, **options)

    def trained(model, examples, *rest):
        given["training"] = examples
        raise InputError("seen")

    fit_bridges = adapt.fit_bridges
    with (
        patch.object(adapt, "fit_bridges", fitted),
        patch.object(adapt, "distil", trained),
        pytest.raises(InputError, match="seen"),
    ):
        run_one(config, "adapt")
    workspace = Workspace.of(config)
    tokenizer = workspace.backbone[1]
    fit, compared = adapt._parts(workspace, method == "best")
    assert {*fit} | {*compared} == {*workspace.splits["adapt"]}
    assert not {*fit} & {*compared}
    texts = [tokenizer.decode(example.tokens[: -example.answer]) for example in given["training"]]
    assert len(texts) == len({*texts}) == min(wanted, len(fit))
    assert {*texts} <= {prompt.prompt for prompt in fit}
    if method == "both":
        sequences = [example.tokens[:-1] for example in given["training"]]
        assert given["bridges"] == sequences, "of which every so many-th is held out"


def _searched(names: list[str], wanted: int) -> list[str]:
    """What `layerbudget search` looks at."""
    seen: list[str] = []
    workspace = SimpleNamespace(splits={"train": names})
    state = SimpleNamespace(is_done=lambda stage: True)
    with (
        patch.object(runner, "_checked"),
        patch.object(runner, "_own_folder") as folder,
        patch.object(runner.Workspace, "of", return_value=workspace),
        patch.object(runner, "own_search_folder"),
        patch.object(runner, "find_least_plans", lambda *given: seen.extend(given[-1]) or []),
        patch.object(runner, "described", return_value=[]),
        patch.object(runner, "write_least_plans", return_value=[]),
    ):
        folder.return_value.__enter__.return_value = state
        runner.run_search(SimpleNamespace(), "mcts", 1, "train", wanted)
    return seen


PICKED = {
    "menu": (
        lambda names, wanted: [name for part in _parts(names, wanted) for name in part],
        lambda count, wanted: count,
    ),
    "search": (_searched, min),
    "timed": (lambda names, wanted: timed_rows(np.arange(len(names)) % 3, wanted), min),
    "shown": (lambda names, wanted: shown_rows([name[-1] for name in names], np.arange(len(names)) == 3, wanted), min),
}


@pytest.mark.parametrize("place", PICKED)
def test_no_prompt_is_picked_twice(place) -> None:
    pick, expected = PICKED[place]
    for count in (2, 3, 9, 31):
        for wanted in (1, 2, 8, 400):
            picked = pick([f"prompt {i}" for i in range(count)], wanted)
            assert len(picked) == len({*picked}) == expected(count, wanted), (count, wanted, picked)
