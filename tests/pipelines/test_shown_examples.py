"""Which prompts stand for a run, and what `generate()` runs for them."""

from unittest.mock import patch

import numpy as np
import pytest
from tiny import tiny_model, tiny_tokenizer
from tiny_allocator import ByLength, make_allocator

from backbone.errors import InputError
from backbone.plan import LayerPlan
from oracle.chat import padded_prompts
from pipelines.config import load_config
from pipelines.evaluation.examples import check_layers_run, example_rows
from pipelines.evaluation.speed import timed_rows
from pipelines.run.runner import run_one
from pipelines.run.workspace import Workspace
from pipelines.stages import adapt
from pipelines.stages.menu import _parts
from runtime import plan_selection as deciding


@pytest.mark.parametrize("method", ["both", "best"])
@pytest.mark.parametrize("wanted", [8, 400])
def test_adapt_fits_on_every_prompt_once(config_file, method, wanted) -> None:
    menu = {"method": "exits", "probe_depth": 2, "plans": 3}
    config = load_config(config_file(menu=menu, adapt={"method": method, "prompts": wanted, "references": False}))
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
    workspace = Workspace(config)
    tokenizer = workspace.model.loaded[1]
    fit, compared = adapt.parts(workspace, method == "best")
    assert {*fit} | {*compared} == {*workspace.prompts.splits["adapt"]}
    assert not {*fit} & {*compared}
    texts = [tokenizer.decode(example.tokens[: -example.answer]) for example in given["training"]]
    assert len(texts) == len({*texts}) == min(wanted, len(fit))
    assert {*texts} <= {prompt.prompt for prompt in fit}
    if method == "both":
        sequences = [example.tokens[:-1] for example in given["training"]]
        assert given["bridges"] == sequences, "of which every so many-th is held out"


PICKED = {
    "menu": (
        lambda names, wanted: [name for part in _parts(names, wanted) for name in part],
        lambda count, wanted: count,
    ),
    "timed": (lambda names, wanted: timed_rows(np.arange(len(names)) % 3, wanted), min),
    "shown": (
        lambda names, wanted: example_rows([name[-1] for name in names], np.arange(len(names)) == 3, wanted),
        min,
    ),
}


@pytest.mark.parametrize("place", PICKED)
def test_no_prompt_is_picked_twice(place) -> None:
    pick, expected = PICKED[place]
    for count in (2, 3, 9, 31):
        for wanted in (1, 2, 8, 400):
            picked = pick([f"prompt {i}" for i in range(count)], wanted)
            assert len(picked) == len({*picked}) == expected(count, wanted), (count, wanted, picked)


TASKS = ["a", "a", "b", "a", "b", "c"]


@pytest.mark.parametrize(
    ("worse", "wanted", "shown"),
    [
        ([], 3, [0, 2, 5]),
        ([], 5, [0, 2, 5, 1, 4]),
        ([], 9, [0, 2, 5, 1, 4, 3]),
        ([3, 4], 3, [0, 2, 4]),
        ([2, 4], 3, [0, 2, 5]),
    ],
)
def test_examples_are_of_each_kind_and_one_is_worse(worse, wanted, shown) -> None:
    assert example_rows(TASKS, np.isin(np.arange(len(TASKS)), worse), wanted) == shown


TEXTS = ["abc", "abcd", "bcd", "bcde", "cde", "cdef", "def", "defg", 11 * "a", 11 * "b"]


@pytest.mark.parametrize(
    ("flipped", "fails", "sentence"),
    [
        (0, False, None),
        (3, False, "generate ran 4.00 of 6 layers on average, where 4.38 were certified (1.12 differ a prompt)"),
        (0, True, "generate ran 6.00 of 6 layers on average, where 4.00 were certified (2.00 differ a prompt)"),
    ],
)
def test_generate_runs_the_layers_that_were_certified(flipped, fails, sentence) -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    allocator = make_allocator(model, controller=ByLength())
    certified = [allocator.allocate(model, **padded_prompts(tokenizer, [text]))[0] for text in TEXTS]
    assert [plan.is_full for plan in certified] == 8 * [False] + 2 * [True]
    for row in range(flipped):
        certified[row] = LayerPlan.skipping(6, {5})
    failure = patch.object(deciding, "run_prefix", side_effect=RuntimeError("a hybrid"))
    with failure if fails else patch.object(deciding, "run_prefix", deciding.run_prefix):
        if sentence is None:
            check_layers_run(allocator, model, tokenizer, TEXTS, certified)
            return
        with pytest.raises(InputError) as error:
            check_layers_run(allocator, model, tokenizer, TEXTS, certified)
    assert sentence in str(error.value)
