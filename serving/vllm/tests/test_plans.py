"""Requests of one batch with different plans, over each family of models."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import N_LAYERS
from engines import closing_engine, greedy
from transformers import AutoModelForCausalLM
from vllm import LLM

from backbone.plan import LayerPlan

PLANS = [None, "0-4", "0-2,6-7", "0-2,5-7", "0,2,4,6,7", "1-7", "0-3"]
_draw = random.Random(0)
PROMPTS = [[_draw.randrange(3, 512) for _ in range(_draw.randrange(2, 70))] for _ in range(14)]
MIXTURE = [PLANS[index % len(PLANS)] for index in range(len(PROMPTS))]


CHUNKS = {"max_num_batched_tokens": 32, "max_num_seqs": 16}


@pytest.fixture(scope="module", params=[{}, CHUNKS], ids=["whole prompts", "prompts in chunks"])
def llm(model_folder: Path, request: pytest.FixtureRequest) -> Iterator[LLM]:
    with closing_engine(model_folder, **request.param) as found:
        yield found


def test_a_mixed_batch_gives_each_request_the_tokens_of_its_plan_alone(llm: LLM) -> None:
    mixed = greedy(llm, PROMPTS, MIXTURE)
    for plan in PLANS:
        own = [index for index, chosen in enumerate(MIXTURE) if chosen == plan]
        assert [mixed[index] for index in own] == greedy(llm, [PROMPTS[index] for index in own], [plan] * len(own))
    assert len({tuple(tokens) for tokens in greedy(llm, [PROMPTS[0]] * len(PLANS), PLANS)}) == len(PLANS)


def test_a_plan_gives_what_the_model_without_these_layers_gives(llm: LLM, model_folder: Path) -> None:
    for text in ("0-4", "0-2,6-7"):
        model = AutoModelForCausalLM.from_pretrained(model_folder)
        plan = LayerPlan.parse(text, N_LAYERS)
        for index in plan.skipped_layers:
            model.model.layers[index].forward = lambda hidden_states, *args, **kwargs: hidden_states
        for prompt, found in zip(PROMPTS[:3], greedy(llm, PROMPTS[:3], [text] * 3), strict=True):
            tokens = list(prompt)
            with torch.no_grad():
                for _ in found:
                    tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
            assert tokens[len(prompt) :] == found


def test_a_layer_computes_the_rows_of_its_requests_alone(llm: LLM) -> None:
    layers = llm.apply_model(_count_rows)[0]
    try:
        greedy(llm, PROMPTS[:4], [None, "0-4", "0-2,6-7", "0-4"])
    finally:
        counted = llm.apply_model(_counted)[0]
    assert layers == N_LAYERS
    everyone = counted[0]
    assert counted[3] == counted[4] < everyone  # all but the gap of the third
    assert counted[5] < counted[3]  # the first alone
    assert counted[6] == counted[7] < everyone


def _count_rows(model: object) -> int:
    layers = model.model.layers  # type: ignore[attr-defined]
    for layer in layers:
        layer.rows = 0

        def count(module: object, inputs: tuple[object, ...]) -> None:
            module.rows += len(inputs[0])  # type: ignore[attr-defined,arg-type]

        layer.counting = layer.mlp.register_forward_pre_hook(lambda module, inputs, layer=layer: count(layer, inputs))
    return len(layers)


def _counted(model: object) -> list[int]:
    layers = model.model.layers  # type: ignore[attr-defined]
    for layer in layers:
        layer.counting.remove()
    return [layer.rows for layer in layers]
