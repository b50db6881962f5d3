"""Keys and values of one plan are not those of another."""

from __future__ import annotations

from collections.abc import Iterator
from unittest.mock import patch

import pytest
from conftest import saved_model
from engines import closing_engine, greedy
from layerbudget_vllm import admission
from vllm import LLM

LONG = list(range(3, 203))
PLAN = "0-2,6-7"


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    folder = saved_model("llama", tmp_path_factory.mktemp("llama"))
    with closing_engine(folder, enable_prefix_caching=True) as found:
        yield found


def answers(llm: LLM) -> list[list[int]]:
    """Of one prompt: under a plan, under the full one, and under the plan again; one after the other."""
    llm.reset_prefix_cache()
    return [greedy(llm, [LONG], [plan])[0] for plan in (PLAN, None, PLAN)]


def test_the_cache_of_one_plan_is_not_used_by_another(llm: LLM) -> None:
    first, full, again = answers(llm)
    llm.reset_prefix_cache()
    assert full == greedy(llm, [LONG], [None])[0]
    assert first == again != full


def test_without_the_salt_an_answer_would_be_silently_wrong(llm: LLM) -> None:
    _, right, _ = answers(llm)
    with patch.object(admission, "admitted", lambda config, prompt, params: prompt):
        _, wrong, _ = answers(llm)
    assert wrong != right


def test_a_plan_finds_its_own_blocks_again(llm: LLM) -> None:
    llm.reset_prefix_cache()
    greedy(llm, [LONG], [PLAN])
    counted = llm.apply_model(_count_tokens)[0]
    assert counted == 0
    greedy(llm, [LONG], [PLAN])
    assert llm.apply_model(_tokens)[0] < len(LONG)


def _count_tokens(model: object) -> int:
    layer = model.model.layers[0]  # type: ignore[attr-defined]
    layer.tokens = 0

    def count(module: object, inputs: tuple[object, ...]) -> None:
        layer.tokens += len(inputs[0])  # type: ignore[arg-type]

    layer.counting = layer.mlp.register_forward_pre_hook(count)
    return 0


def _tokens(model: object) -> int:
    layer = model.model.layers[0]  # type: ignore[attr-defined]
    layer.counting.remove()
    return int(layer.tokens)
