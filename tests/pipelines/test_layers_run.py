"""What `generate()` runs is what was certified, or the run ends with a sentence."""

from unittest.mock import patch

import pytest
from tiny import tiny_model, tiny_tokenizer
from tiny_allocator import ByLength, make_allocator

from backbone.errors import InputError
from backbone.plan import LayerPlan
from oracle.chat import padded_prompts
from pipelines.evaluation.layers_run import check_layers_run
from runtime import plan_selection as deciding

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
