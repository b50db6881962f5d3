"""A router before a real engine with plans, as two processes: `make test-vllm` sets where vLLM is installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from servers import free_port, kill, running, wait_until_well
from tiny import tiny_model, tiny_tokenizer
from tiny_allocator import make_allocator

from backbone.execution.apply_plan import apply_plan
from backbone.plan import LayerPlan

PYTHON = os.environ.get("LAYERBUDGET_VLLM_PYTHON", "")
"""Of the environment that vLLM and layerbudget-vllm are installed in."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="make test-vllm: vLLM lives in an environment of its own"),
]
ANSWER = {"max_tokens": 6, "temperature": 0, "ignore_eos": True, "return_token_ids": True}


@contextmanager
def process(command: list[str], options: dict[str, str], log: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A server and its URL, once its `/health` answers."""
    port = free_port()
    words = [word for option in {**options, "--port": str(port)}.items() for word in option]
    with running([*command, *words], log) as started:
        wait_until_well(f"http://127.0.0.1:{port}", [started], log, seconds=240)
        yield started, f"http://127.0.0.1:{port}"


def engine(model: Path, log: Path) -> Any:
    options = {
        "--model": str(model),
        "--host": "127.0.0.1",
        "--worker-cls": "layerbudget_vllm.workers.PlannedCPUWorker",
        "--dtype": "float32",
        "--max-model-len": "128",
        "--kv-cache-memory-bytes": str(64 << 20),
        "--served-model-name": "tiny",
    }
    return process([PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--enforce-eager"], options, log)


def router(folder: Path, upstream: str, log: Path) -> Any:
    options = {
        "--allocator": str(folder / "allocator"),
        "--model": str(folder / "model"),
        "--upstream": upstream,
        "--decision-limit-ms": "20000",
    }
    return process([sys.executable, "-m", "layerbudget", "serve"], options, log)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    model = tiny_model("llama", hidden_size=128)  # heads of 32 numbers, the fewest that vLLM takes
    model.save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    make_allocator(model).save_pretrained(folder / "allocator")
    return folder


def ask(url: str, prompt: Any, **more: Any) -> httpx2.Response:
    return httpx2.post(f"{url}/v1/completions", json={"model": "tiny", "prompt": prompt, **ANSWER, **more}, timeout=120)


def test_requests_through_router_and_engine_run_their_plans(folder: Path, tmp_path: Path) -> None:
    """Tokens are those of transformers under the plan, whatever else is in the batch; a killed engine is named."""
    model, tokenizer = tiny_model("llama", hidden_size=128), tiny_tokenizer()
    prompts = [tokenizer(text).input_ids for text in ("abcdefghijk", "hgfedcbaa", "feedbag", "cabb", "ab", "d" * 30)]
    with (
        engine(folder / "model", tmp_path / "engine.log") as (serving, upstream),
        router(folder, upstream, tmp_path / "router.log") as (_, url),
    ):
        with ThreadPoolExecutor(12) as threads:
            found = list(threads.map(lambda prompt: ask(url, prompt), prompts * 4))
        plans = set()
        for prompt, answer in zip(prompts * 4, found, strict=True):
            assert answer.status_code == 200, answer.text
            plan = LayerPlan.parse(answer.headers["x-layer-plan"], 6)
            plans.add(plan)
            assert answer.json()["choices"][0]["token_ids"] == under(model, plan, prompt)
        assert len(plans) > 1
        refused = ask(upstream, prompts[0], vllm_xargs={"layer_plan": "0-9"})
        assert refused.status_code == 400
        assert "layer 6 is outside the model" in refused.text
        with httpx2.stream(
            "POST",
            f"{url}/v1/completions",
            json={"model": "tiny", "prompt": prompts[0], **ANSWER, "max_tokens": 100, "stream": True},
            timeout=120,
        ) as stream:
            lines = stream.iter_lines()
            next(lines)
            kill(serving)
            said = [line for line in lines if line]
        assert "broke off" in json.loads(said[-2].removeprefix("data: "))["error"]["message"]
        assert ask(url, prompts[0]).status_code == 502
        assert httpx2.get(f"{url}/health", timeout=20).status_code == 503


def under(model: Any, plan: LayerPlan, prompt: list[int]) -> list[int]:
    import torch

    with apply_plan(model, plan):
        output = model.generate(
            input_ids=torch.tensor([prompt]), max_new_tokens=6, min_new_tokens=6, do_sample=False, eos_token_id=None
        )
    return list(output[0, len(prompt) :].tolist())


def test_a_killed_router_leaves_no_client_waiting(folder: Path, tmp_path: Path) -> None:
    with (
        engine(folder / "model", tmp_path / "engine.log") as (_, upstream),
        router(folder, upstream, tmp_path / "router.log") as (routing, url),
        ThreadPoolExecutor(1) as threads,
    ):
        waiting = threads.submit(ask, url, [5, 6, 7], max_tokens=110)
        time.sleep(0.3)
        kill(routing)
        with pytest.raises(httpx2.HTTPError):
            waiting.result(timeout=60)
        assert ask(upstream, [5, 6, 7]).status_code == 200
