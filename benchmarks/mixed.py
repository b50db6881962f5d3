"""Mixed batches step by step: one pass for rows with different plans, against the stock model.

    python benchmarks/mixed.py --model gemma --dtype float32           # CPU, Gemma 3 270M with its weights

Cases, each with at least one full row (the first):

- exit_half: all other rows leave after half of the layers, the least that a step can save beside the most cutting
- last_layer: all other rows leave out the last layer, so that next to nothing is saved
- gap: all other rows leave out a gap in the middle, after which all rows go on together
- spread: plans of 1/2, 2/3, 5/6 and all of the layers in turn, in no order

Stock and cases take turns at every single step, in reversed order in every second round, so that a ratio compares
neighbours in time; printed are medians of these ratios: the time of a step to that of a stock step (below 1 is faster).
Plans are entered before the clock starts, as in `generate()`, which enters them once. Writes
benchmarks/results/mixed-NAME-DEVICE-DTYPE.json.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from decode import RESULTS, SHAPES, load, paired
from transformers import DynamicCache, PreTrainedModel, StaticCache

from backbone.execution.apply_plan import apply_plans
from backbone.execution.cache import cache_bytes
from backbone.families import decoder_layers
from backbone.plan import LayerPlan
from runtime.paired_timing import machine, synchronize


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="gemma", help=f"gemma, {', '.join(SHAPES)}, or what load_backbone takes")
    parser.add_argument("--name", help="name in the result's file; default: the last part of --model")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--batches", type=int, nargs="+", default=[2, 8, 32])
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--static", action="store_true", help="static cache, its steps uncompiled")
    arguments = parser.parse_args()
    model = load(arguments.model, arguments.device).to(getattr(torch, arguments.dtype))
    rows = [row for batch in arguments.batches for row in measure(model, batch, arguments)]
    name = arguments.name or Path(arguments.model).name
    path = RESULTS / f"mixed-{name}-{model.device.type}-{arguments.dtype}.json"
    settings = {key: value for key, value in vars(arguments).items() if key not in ("model", "name")}
    path.write_text(json.dumps({"machine": machine(), "settings": settings, "rows": rows}, indent=2) + "\n")
    print(f"{path.name}: a mixed step takes at most {max(row['step_to_stock'] for row in rows):.3f} x a stock step")


def cases(n_layers: int, batch: int) -> dict[str, list[LayerPlan]]:
    """The plans of a batch's rows, for each case."""
    full = LayerPlan.full(n_layers)
    others = {
        "exit_half": LayerPlan.exiting(n_layers, n_layers // 2),
        "last_layer": LayerPlan.exiting(n_layers, n_layers - 1),
        "gap": LayerPlan.skipping(n_layers, range(n_layers // 2, n_layers // 2 + n_layers // 4)),
    }
    found = {name: [full] + [plan] * (batch - 1) for name, plan in others.items()}
    depths = [n_layers, n_layers // 2, n_layers * 5 // 6, n_layers * 2 // 3]
    found["spread"] = [LayerPlan.exiting(n_layers, depths[row % 4]) for row in range(batch)]
    return found


class Rows:
    """The rows of a batch, each under its plan, or under none, with their cache. Times are milliseconds."""

    def __init__(self, model: PreTrainedModel, plans: Sequence[LayerPlan] | None, *, static: bool = False) -> None:
        self.model, self.plans, self.static = model, plans, static
        self.prefill_ms: list[float] = []
        self.step_ms: list[float] = []

    @torch.inference_mode()
    def prefill(self, prompts: torch.Tensor, new_tokens: int) -> None:
        """Runs prompts [B, S] into a new cache."""
        length = prompts.shape[1] + new_tokens
        config = self.model.config
        self.cache: Any = (
            StaticCache(config=config, max_cache_len=length) if self.static else DynamicCache(config=config)
        )
        self.length = 0
        self.prefill_ms.append(self._timed(prompts))

    @torch.inference_mode()
    def step(self) -> None:
        """Decodes one token of each sequence."""
        self.step_ms.append(self._timed(self.tokens))

    def _timed(self, tokens: torch.Tensor) -> float:
        positions = torch.arange(self.length, self.length + tokens.shape[1], device=tokens.device)[None]
        self.length += tokens.shape[1]
        with nullcontext() if self.plans is None else apply_plans(self.model, self.plans):
            synchronize()
            start = time.perf_counter()
            logits = self.model(
                tokens, position_ids=positions, cache=self.cache, use_cache=True, logits_to_keep=1
            ).logits
            self.tokens = logits[:, -1:].argmax(-1)
            synchronize()
            return (time.perf_counter() - start) * 1000


def in_turn(variants: Mapping[str, Rows], prompts: torch.Tensor, new_tokens: int, rounds: int) -> None:
    """Every variant runs the prompts, then each step in turn with the others; a first round is warm-up."""
    for number in range(1 + rounds):
        if number == 1:
            for variant in variants.values():
                variant.prefill_ms.clear()
                variant.step_ms.clear()
        order = list(variants.values()) if number % 2 else list(reversed(variants.values()))
        for variant in order:
            variant.prefill(prompts, new_tokens)
        for _ in range(new_tokens - 1):
            for variant in order:
                variant.step()


def measure(model: PreTrainedModel, batch: int, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a case."""
    planned = cases(len(decoder_layers(model)), batch)
    variants = {name: Rows(model, plans, static=arguments.static) for name, plans in planned.items()}
    variants = {"stock": Rows(model, None, static=arguments.static), **variants}
    shape = (batch, arguments.prompt_tokens)
    prompts = torch.randint(3, min(1000, model.config.vocab_size), shape, generator=torch.Generator().manual_seed(0))
    in_turn(variants, prompts.to(model.device), arguments.new_tokens, arguments.rounds)
    stock, found = variants["stock"], []
    for name, plans in planned.items():
        variant = variants[name]
        row = {
            "batch": batch,
            "case": name,
            "layers": round(sum(plan.layers for plan in plans) / batch, 3),
            "stock_step_ms": paired(stock.step_ms, [1.0] * len(stock.step_ms)),
            "step_to_stock": paired(variant.step_ms, stock.step_ms),
            "prefill_to_stock": paired(variant.prefill_ms, stock.prefill_ms),
            "cache_to_stock": round(cache_bytes(variant.cache) / cache_bytes(stock.cache), 3),
        }
        print(json.dumps(row), flush=True)
        found.append(row)
    return found


if __name__ == "__main__":
    main()
