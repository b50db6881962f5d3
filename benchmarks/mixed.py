"""Mixed batches step by step: one pass for rows with different plans, against the stock model and against the law.

    python benchmarks/mixed.py --model gemma --dtype float32           # CPU, Gemma 3 270M with its weights
    python benchmarks/mixed.py --model llama-3.1-8b --device cuda --batches 1 8 32 128 256 --contexts 512 4096 \\
        --caches dynamic static --minutes 9.5                          # that shape, random bfloat16 weights

Cases, each but `run` with at least one full row (with one row alone: three quarters of the layers):

- exit_half: all other rows leave after half of the layers, which cuts rows the most
- last_layer: all other rows leave out the last layer, so that next to nothing is saved
- gap: all other rows leave out a gap in the middle, after which all rows go on together
- demo: depths drawn with the shares of the demo's allocator, in no order
- run, with --run: plans in the shares in which the allocator of that run chose them for its test prompts, in no order

Stock and cases take turns at every single step, in reversed order in every second round, so that a ratio compares
neighbours in time; medians of these ratios count: the time of a step to that of a stock step, below 1 is faster.
`law` is what `StepCosts.mixed_ms` says of the same rows, from passes measured in the same process. Plans are entered
before timing starts, as in `generate()`, which enters them once. Caches are filled with copies of one token's keys
and values: what a step costs does not depend on them. Mixed steps run uncompiled; `--compiled` adds the stock model
with a compiled step where the cache is static.

Writes benchmarks/results/mixed-NAME-DEVICE-DTYPE.json after each batch size, context and cache; what is there with the
same settings is not measured again, and after --minutes nothing new is begun.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from decode import RESULTS, SHAPES, compile_config, load, paired
from transformers import DynamicCache, PreTrainedModel, StaticCache

from backbone.execution.apply_plan import apply_plans
from backbone.execution.rows import cache_bytes
from backbone.families import decoder_layers
from backbone.plan import LayerPlan, PlanMenu
from runtime.paired_timing import machine, synchronize
from runtime.step_costs import StepCosts, known_step_costs, measured_step_costs

SETTINGS = ("new_tokens", "rounds", "compiled")
"""Settings that make two results comparable."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="gemma", help=f"gemma, {', '.join(SHAPES)}, or what load_backbone takes")
    parser.add_argument("--name", help="name in the result's file; default: the last part of --model")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--run", type=Path, help="folder of a finished run of this model")
    parser.add_argument("--batches", type=int, nargs="+", default=[2, 8, 32])
    parser.add_argument("--contexts", type=int, nargs="+", default=[64], help="tokens in the cache before the steps")
    parser.add_argument("--caches", nargs="+", choices=["dynamic", "static"], default=["dynamic"])
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--new-tokens", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--no-law", action="store_true", help="do not measure what the law needs, if it is not known")
    parser.add_argument("--minutes", type=float, default=60.0)
    arguments = parser.parse_args()
    deadline = time.perf_counter() + 60 * arguments.minutes
    model = load(arguments.model, arguments.device).to(getattr(torch, arguments.dtype))
    path = RESULTS / f"mixed-{arguments.name or Path(arguments.model).name}-{model.device.type}-{arguments.dtype}.json"
    of_run = {"run": arguments.run.name} if arguments.run else {}
    result = begun(path, {name: getattr(arguments, name) for name in SETTINGS} | of_run)
    costs = known_step_costs(model) if arguments.no_law else measured_step_costs(model)
    result["step_costs"] = asdict(costs) if costs.measured else None
    for cache, context, batch in product(arguments.caches, arguments.contexts, arguments.batches):
        cell = {"cache": cache, "context": context, "batch": batch}
        if any(all(row[name] == value for name, value in cell.items()) for row in result["rows"]):
            continue
        if time.perf_counter() > deadline:
            print(f"{cell} not begun: the time is up")
            continue
        try:
            result["rows"] += [{**cell, **row} for row in measure(model, costs, cell, arguments)]
        except torch.OutOfMemoryError:
            result["rows"].append({**cell, "not_run": "the device's memory does not suffice"})
        path.write_text(json.dumps(result, indent=2) + "\n")
    path.write_text(json.dumps(result, indent=2) + "\n")
    slowest = max((row["step_to_stock"] for row in result["rows"] if "step_to_stock" in row), default=0.0)
    print(f"{path.name}: a mixed step takes at most {slowest:.3f} x a stock step")


def begun(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The result as far as it was measured on this machine with these settings; else an empty one."""
    empty = {"machine": machine(), "settings": settings, "rows": []}
    if not path.exists():
        return empty
    found: dict[str, Any] = json.loads(path.read_text())
    return found if all(found[name] == empty[name] for name in ("machine", "settings")) else empty


def demo_plans(n_layers: int, count: int) -> list[LayerPlan]:
    """Exits drawn with the shares in which the demo's allocator chooses its plans, scaled to a model's layers."""
    metrics = json.loads((RESULTS / "demo.json").read_text())["metrics"]
    depths = [round(budget * 18) for budget, _ in metrics["healing"]["after"]["static"]]
    drawn = random.Random(0).choices(depths, metrics[metrics["best"]]["plan_shares"], k=count)
    return [LayerPlan.exiting(n_layers, round(depth * n_layers / depths[-1])) for depth in drawn]


def chosen_plans(run: Path, count: int) -> list[LayerPlan]:
    """Plans of a run's menu, as many of each as its best controller chose at the certified price, in no order."""
    metrics, menu = json.loads((run / "metrics.json").read_text()), PlanMenu.load(run / "allocator" / "menu.json")
    ends = np.round(np.cumsum(metrics[metrics["best"]]["plan_shares"]) * count).astype(int)
    plans = [plan for plan, n in zip(menu.plans, np.diff(ends, prepend=0), strict=True) for _ in range(n)]
    return random.Random(0).sample(plans, count)


def cases(n_layers: int, batch: int, run: Path | None) -> dict[str, list[LayerPlan]]:
    """The plans of a batch's rows, for each case."""
    if batch == 1:
        return {"alone": [LayerPlan.exiting(n_layers, n_layers * 3 // 4)]}
    full = LayerPlan.full(n_layers)
    others = {
        "exit_half": LayerPlan.exiting(n_layers, n_layers // 2),
        "last_layer": LayerPlan.exiting(n_layers, n_layers - 1),
        "gap": LayerPlan.skipping(n_layers, range(n_layers // 2, n_layers // 2 + n_layers // 4)),
    }
    found = {name: [full] + [plan] * (batch - 1) for name, plan in others.items()}
    found["demo"] = [*demo_plans(n_layers, batch - 1), full]
    if run is not None:
        found["run"] = chosen_plans(run, batch)
    return found


class Rows:
    """The rows of a batch, each under its plan, or under none, with their cache. Times are milliseconds."""

    def __init__(
        self, model: PreTrainedModel, plans: Sequence[LayerPlan] | None, kind: str, *, compiled: bool = False
    ) -> None:
        self.model, self.plans, self.kind, self.compiled = model, plans, kind, compiled
        self.step_ms: list[float] = []

    @torch.inference_mode()
    def fill(self, batch: int, context: int, new_tokens: int) -> None:
        """A new cache of so many rows and tokens, made of one token's keys and values."""
        config = self.model.config
        static = self.kind == "static"
        self.cache: Any = (
            StaticCache(config=config, max_cache_len=context + new_tokens) if static else DynamicCache(config=config)
        )
        self.length = 0
        self._run(torch.full((batch, 1), 5, device=self.model.device), compiled=False)
        self.length = context
        for layer in self.cache.layers:
            if getattr(layer, "keys", None) is not None:
                _fill(layer, context)

    @torch.inference_mode()
    def step(self) -> None:
        """Decodes one token of each sequence."""
        with nullcontext() if self.plans is None else apply_plans(self.model, self.plans):
            synchronize()
            start = time.perf_counter()
            self._decode(self.tokens, compiled=self.compiled)
            synchronize()
            self.step_ms.append((time.perf_counter() - start) * 1000)

    def _run(self, tokens: torch.Tensor, *, compiled: bool) -> None:
        with nullcontext() if self.plans is None else apply_plans(self.model, self.plans):
            self._decode(tokens, compiled=compiled)

    def _decode(self, tokens: torch.Tensor, *, compiled: bool) -> None:
        positions = torch.full((1, 1), self.length, device=tokens.device)
        self.length += 1
        call = self.model.get_compiled_call(compile_config(self.model.device)) if compiled else self.model
        logits = call(tokens, position_ids=positions, cache=self.cache, use_cache=True).logits
        self.tokens = logits[:, -1:].argmax(-1)


def _fill(layer: Any, context: int) -> None:
    """A layer of a cache goes from one token to `context` of them."""
    if hasattr(layer, "max_cache_len"):
        layer.keys[:, :, 1:context] = layer.keys[:, :, :1]
        layer.values[:, :, 1:context] = layer.values[:, :, :1]
    else:
        kept = min(context, getattr(layer, "sliding_window", context + 1) - 1)
        layer.keys = layer.keys.expand(-1, -1, kept, -1).contiguous()
        layer.values = layer.values.expand(-1, -1, kept, -1).contiguous()
    if hasattr(layer, "cumulative_length"):
        _set_length(layer, context)


def _set_length(layer: Any, context: int) -> None:
    if isinstance(layer.cumulative_length, torch.Tensor):
        layer.cumulative_length.fill_(context)
    else:
        layer.cumulative_length = context


def in_turn(variants: Mapping[str, Rows], batch: int, context: int, new_tokens: int, rounds: int) -> None:
    """Every variant gets a new cache, then each step runs in turn with the others'; a first round is warm-up."""
    for number in range(1 + rounds):
        if number == 1:
            for variant in variants.values():
                variant.step_ms.clear()
        order = list(variants.values()) if number % 2 else list(reversed(variants.values()))
        for variant in order:
            variant.fill(batch, context, new_tokens)
        for _ in range(new_tokens - 1):
            for variant in order:
                variant.step()


def measure(
    model: PreTrainedModel, costs: StepCosts, cell: Mapping[str, Any], arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """One row a case, of one batch size, context and kind of cache."""
    batch, kind = cell["batch"], cell["cache"]
    planned = cases(len(decoder_layers(model)), batch, arguments.run)
    variants = {"stock": Rows(model, None, kind), **{name: Rows(model, plans, kind) for name, plans in planned.items()}}
    if arguments.compiled and kind == "static":
        variants["compiled"] = Rows(model, None, kind, compiled=True)
    in_turn(variants, batch, cell["context"], arguments.new_tokens, arguments.rounds)
    stock, found = variants["stock"], []
    for name, variant in variants.items():
        row: dict[str, Any] = {"case": name, "step_ms": paired(variant.step_ms, [1.0] * len(variant.step_ms))}
        if name in planned:
            row["layers"] = round(sum(plan.layers for plan in planned[name]) / batch, 3)
            row["step_to_stock"] = paired(variant.step_ms, stock.step_ms)
            row["law"] = round(predicted(costs, planned[name]), 3) if costs.measured else None
            row["cache_to_stock"] = round(cache_bytes(variant.cache) / cache_bytes(stock.cache), 3)
        print(json.dumps({**cell, **row}), flush=True)
        found.append(row)
    return found


def predicted(costs: StepCosts, plans: Sequence[LayerPlan]) -> float:
    """The time of a mixed step to that of a stock step, by the law; contexts are left out of it."""
    n_layers, batch = plans[0].n_layers, len(plans)
    run = np.array([sum((i in p.attention) + (i in p.mlp) for p in plans) / 2 for i in range(n_layers)])
    return costs.mixed_ms(batch, run) / costs.mixed_ms(batch, np.full(n_layers, batch))


if __name__ == "__main__":
    main()
