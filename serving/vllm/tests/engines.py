"""An engine of vLLM over a small model, and greedy tokens from it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from layerbudget_vllm.requests import KEY, WORKERS
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory

NEW_TOKENS = 12


@contextmanager
def closing_engine(folder: Path, **options: Any) -> Iterator[LLM]:
    """One at a time: what they share in a process is given back at the end."""
    yield LLM(
        str(folder),
        **{
            "skip_tokenizer_init": True,
            "dtype": "float32",
            "max_model_len": 256,
            "kv_cache_memory_bytes": 64 << 20,
            "enforce_eager": True,
            "enable_prefix_caching": False,
            "distributed_executor_backend": "uni",
            "worker_cls": WORKERS[0],
            "disable_log_stats": True,
            **options,
        },
    )
    cleanup_dist_env_and_memory()


def greedy(llm: LLM, prompts: Sequence[Sequence[int]], plans: Sequence[str | None]) -> list[list[int]]:
    """Tokens that follow each prompt [R] under its plan, all in one batch."""
    params = [
        SamplingParams(
            temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False, extra_args=plan and {KEY: plan}
        )
        for plan in plans
    ]
    outputs = llm.generate([{"prompt_token_ids": list(prompt)} for prompt in prompts], params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]
