"""Requests without a plan get what they get without this package, bit for bit."""

from __future__ import annotations

from pathlib import Path

from engines import closing_engine, greedy
from vllm import LLM, SamplingParams

STOCK = "vllm.v1.worker.cpu_worker.CPUWorker"
PROMPTS = [list(range(3, 3 + length)) for length in (1, 7, 40, 90)]


def logprobs(llm: LLM) -> list[list[dict[int, float]]]:
    """Of each prompt and answer, bit for bit."""
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, detokenize=False, logprobs=5)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], params, use_tqdm=False)
    return [
        [{token: value.logprob for token, value in step.items()} for step in output.outputs[0].logprobs or []]
        for output in outputs
    ]


def test_stock_requests_are_bit_equal(model_folder: Path) -> None:
    with closing_engine(model_folder, worker_cls=STOCK) as llm:
        stock = logprobs(llm)
    with closing_engine(model_folder) as llm:
        assert logprobs(llm) == stock
        greedy(llm, PROMPTS, [None, "0-3", "0-1,6-7", None])
        assert logprobs(llm) == stock
