"""What the engine cannot run is refused in one sentence before it reaches a batch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import saved_model
from engines import closing_engine, greedy
from layerbudget_vllm.admission import admitted
from layerbudget_vllm.requests import KEY, WORKERS, LayerPlanError, check_engine
from vllm import LLM, SamplingParams
from vllm.exceptions import VLLMValidationError


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    with closing_engine(saved_model("llama", tmp_path_factory.mktemp("llama"))) as found:
        yield found


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        ("0-9", "layer 8 is outside the model: it has layers 0 to 7"),
        ("zero", "cannot read 'zero'"),
        (7, "a plan is a text"),
        ("0-5,6a", "runs half of a layer"),
    ],
)
def test_a_plan_that_cannot_run_is_refused(llm: LLM, plan: Any, said: str) -> None:
    with pytest.raises(VLLMValidationError, match=said):
        greedy(llm, [[3, 4, 5]], [plan])
    assert greedy(llm, [[3, 4, 5]], [None])


def config(**changed: Any) -> Any:
    found = {
        "parallel_config": SimpleNamespace(worker_cls=WORKERS[0], pipeline_parallel_size=1),
        "model_config": SimpleNamespace(
            architectures=["LlamaForCausalLM"], hf_text_config=SimpleNamespace(num_hidden_layers=8)
        ),
        "speculative_config": None,
        "lora_config": None,
    }
    return SimpleNamespace(**{**found, **changed})


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"parallel_config": SimpleNamespace(worker_cls="other", pipeline_parallel_size=1)}, "--worker-cls"),
        ({"parallel_config": SimpleNamespace(worker_cls=WORKERS[0], pipeline_parallel_size=2)}, "pipeline"),
        ({"model_config": SimpleNamespace(architectures=["OPTForCausalLM"])}, "OPTForCausalLM is not among"),
        ({"speculative_config": object()}, "speculative decoding"),
        ({"lora_config": object()}, "LoRA"),
    ],
)
def test_an_engine_that_cannot_run_plans_says_why(changed: dict[str, Any], said: str) -> None:
    with pytest.raises(LayerPlanError, match=said):
        check_engine(config(**changed))


@pytest.mark.parametrize("prompt", ["text", [3, 4], {"prompt_token_ids": [3, 4], "cache_salt": "own"}])
def test_a_plan_is_part_of_the_salt(prompt: Any) -> None:
    salts = [
        admitted(config(), prompt, SamplingParams(extra_args={KEY: plan}))["cache_salt"] for plan in ("0-3", "0-4")
    ]
    assert salts[0] != salts[1]
    assert salts[0].endswith("|own") == isinstance(prompt, dict)


def test_the_full_plan_is_no_plan() -> None:
    assert admitted(config(), "text", SamplingParams(extra_args={KEY: "0-7"})) == "text"


def test_a_worker_without_the_plugin_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing would keep plans that cannot be, or another plan's keys and values, from a batch."""
    monkeypatch.setattr("layerbudget_vllm.runner.is_registered", lambda: False)
    with pytest.raises(LayerPlanError, match="VLLM_PLUGINS"), closing_engine(saved_model("llama", tmp_path)):
        pass
