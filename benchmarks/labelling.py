"""What labels cost: by plain generation, by the shortcut, by bisection, and one at a time, for each menu and judge.

    python benchmarks/labelling.py                                  # Gemma 3 270M, 128 embedded prompts, 12 plans
    python benchmarks/labelling.py --data MIXED.jsonl --name mixed  # other prompts

All parts run alternately in a process, on the same prompts and the same menu. Also kills a labelling run 100 times and
opens a store of a million labels. Writes benchmarks/results/labelling-NAME.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import signal
import sqlite3
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import workload
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from backbone.families import sublayer_bytes
from backbone.loading import load_backbone
from backbone.plan import LayerPlan, PlanMenu, SublayerBytes
from oracle.decoding import Decoding
from oracle.frontier.frontier import least_sufficient, sufficient_plans
from oracle.labels.labeller import Labeller
from oracle.labels.reader import score_matrix
from oracle.labels.store import Label, LabelStore
from oracle.menus import MENUS, build_menu
from oracle.menus.base import MenuTask
from oracle.prompts import Prompt
from oracle.search.base import SearchSpace
from oracle.search.driver import search_prompts
from oracle.search.searchers import BisectionSearch

RESULTS = Path(__file__).parent / "results"
KILLS, LABELLED = 100, 3000
"""Times that a run is killed, and the prompts that it labels."""


def main() -> None:
    options = workload.parser(__doc__ or "", prompts=128)
    options.add_argument("--menus", nargs="+", choices=sorted(MENUS), default=["exits", "greedy"])
    options.add_argument("--plans", type=int, default=12)
    options.add_argument("--alone", type=int, default=8, help="prompts that are searched one at a time")
    options.add_argument("--judges", nargs="+", choices=["agreement", "reference"], default=["agreement", "reference"])
    arguments = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        robustness = {"kills": kills(Path(folder)), "million": million(Path(folder))}
        print(json.dumps(robustness), flush=True)
        costs = measure(arguments, Path(folder))
    workload.write(RESULTS / f"labelling-{arguments.name}.json", arguments, {**costs, **robustness})


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Menu -> its plans, and judge -> what its labels cost each way."""
    model, tokenizer = load_backbone(arguments.model, device=arguments.device)
    decoding = workload.decoding_of(arguments)
    searched, rest = workload.split(arguments)
    texts = [prompt.prompt for prompt in searched]
    result: dict[str, Any] = {}
    for method in arguments.menus:
        start = time.perf_counter()
        menu = build_menu(method, MenuTask(model, tokenizer, texts, decoding, 4, arguments.plans, 0.4))
        seconds = round(time.perf_counter() - start, 1)
        result[method] = {"menu": [str(plan) for plan in menu.plans], "menu_seconds": seconds}
        print(result[method], flush=True)
        for judge in arguments.judges:
            prompts = [replace(prompt, judge="agreement") for prompt in rest] if judge == "agreement" else rest
            stores = folder / f"{method}-{judge}"
            result[method][judge] = compared(model, tokenizer, prompts, menu, decoding, arguments, stores)
    return result


def compared(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    menu: PlanMenu,
    decoding: Decoding,
    arguments: argparse.Namespace,
    folder: Path,
) -> dict[str, Any]:
    folder.mkdir()
    alone = prompts[:: len(prompts) // arguments.alone][: arguments.alone]
    ways = {
        "exhaustive": (prompts, arguments.batch_size, False, False),
        "shortcut": (prompts, arguments.batch_size, True, False),
        "bisection": (prompts, arguments.batch_size, True, True),
        "one_at_a_time": (alone, 1, False, False),
    }
    found: dict[str, Any] = {}
    scores, least = {}, {}
    for name, (some, batch_size, verify, by_bisection) in ways.items():
        store = LabelStore(folder / f"{name}.db")
        labeller = Labeller(model, tokenizer, decoding, store, batch_size, verify=verify)
        start = time.perf_counter()
        if by_bisection:
            least[name] = bisected(labeller, some, menu, sublayer_bytes(model))
        else:
            labeller.label(some, menu)
            scores[name] = score_matrix(labeller.read(some, menu))
            least[name] = least_sufficient(sufficient_plans(scores[name])).tolist()
        seconds = time.perf_counter() - start
        found[name] = {"seconds": round(seconds, 1), "labels": len(store), "forward_tokens": forward_tokens(store)}
        found[name]["seconds_per_label"] = round(seconds / len(store), 4)
        print(name, found[name], flush=True)
    plain, alike = scores["exhaustive"], scores["exhaustive"] == scores["shortcut"]
    for name in ("shortcut", "bisection"):
        for what in ("seconds", "forward_tokens"):
            found[name][f"{what}_to_exhaustive"] = round(found[name][what] / found["exhaustive"][what], 3)
        pairs = zip(least[name], least["exhaustive"], strict=True)
        found[name]["equal_least_plans"] = round(float(np.mean([a == b for a, b in pairs])), 4)
    found["shortcut"]["equal_scores"] = round(float(alike.mean()), 4)
    per_label = {name: way["seconds_per_label"] for name, way in found.items()}
    found["one_at_a_time"]["seconds_per_label_to_shortcut"] = round(
        per_label["one_at_a_time"] / per_label["shortcut"], 2
    )
    found["mean_scores"] = [round(value, 4) for value in plain.mean(axis=0).tolist()]
    return found


def bisected(labeller: Labeller, prompts: Sequence[Prompt], menu: PlanMenu, sizes: SublayerBytes) -> list[int]:
    """Index of each prompt's least sufficient plan, found by bisection without the verification of cheaper plans."""
    rounds = int(np.ceil(np.log2(len(menu))))
    results = search_prompts(BisectionSearch(), SearchSpace(menu, sizes), labeller, prompts, rounds)
    return [menu.plans.index(found.plan) for found in results]


def forward_tokens(store: LabelStore) -> float:
    with sqlite3.connect(store.path) as connection:
        return round(connection.execute("SELECT SUM(forward_tokens) FROM labels").fetchone()[0], 1)


def kills(folder: Path) -> dict[str, Any]:
    """Kill a labelling run of a tiny model again and again; compare with a run that was left alone."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama", vocab_size=99, hidden_size=32, intermediate_size=64, num_hidden_layers=6, num_attention_heads=4
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    menu = PlanMenu.build([LayerPlan.exiting(6, n) for n in (3, 4, 5)], sublayer_bytes(model), 2)
    texts = [" ".join(str((i * k + i // 97) % 97) for k in range(1, 9)) for i in range(LABELLED)]
    prompts = [Prompt(f"p{i}", "t", text, "", "agreement") for i, text in enumerate(texts)]

    def label(path: Path) -> None:
        Labeller(model, Numbers(), Decoding(6), LabelStore(path), 8).label(prompts, menu)  # type: ignore[arg-type]

    draw, fork = random.Random(0), multiprocessing.get_context("fork")
    killed = 0
    disturbed = folder / "disturbed.db"
    while killed < KILLS:
        process = fork.Process(target=label, args=(disturbed,))
        process.start()
        time.sleep(draw.uniform(0.05, 0.6))
        if process.is_alive():
            os.kill(process.pid or 0, signal.SIGKILL)
            killed += 1
        process.join()
        if process.exitcode == 0:
            break
    label(disturbed)
    label(folder / "alone.db")
    torch.set_num_threads(threads)
    hashes = [content_hash(folder / name) for name in ("disturbed.db", "alone.db")]
    return {"kills": killed, "labels": len(LabelStore(disturbed)), "expected": len(prompts) * len(menu)} | {
        "hash_equal": hashes[0] == hashes[1]
    }


class Numbers:
    """A tokenizer of numbers below 99, for a model without one."""

    pad_token_id = eos_token_id = 98
    bos_token = None

    def __call__(self, text: str, **options: Any) -> Any:
        return SimpleNamespace(input_ids=[int(word) for word in text.split()])

    def pad(self, encoded: dict[str, list[list[int]]], **options: Any) -> Any:
        rows = encoded["input_ids"]
        width = max(map(len, rows))

        class Batch(dict[str, torch.Tensor]):
            def to(self, device: torch.device) -> Any:
                return self

        ids = torch.tensor([[self.pad_token_id] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        return Batch(input_ids=ids, attention_mask=mask)

    def decode(self, ids: Sequence[int], **options: Any) -> str:
        return " ".join(map(str, ids))


def content_hash(path: Path) -> str:
    """Of all labels but what they cost."""
    columns = "model, prompt, plan, decoding, judge, answer, answer_ids, score, prompt_tokens"
    with sqlite3.connect(path) as connection:
        rows = sorted(connection.execute(f"SELECT {columns} FROM labels"))
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def million(folder: Path) -> dict[str, float]:
    """Seconds to open a store of a million labels and to find out what is missing."""
    store = LabelStore(folder / "million.db")
    plans, n = [str(LayerPlan.exiting(18, k)) for k in range(7, 19)], 83_334
    for plan in plans:
        row = ("m", plan, "d", "exact", "an answer", (1, 2, 3, 4))
        store.add(
            Label(row[0], f"{i:024x}", row[1], row[2], row[3], row[4], row[5], 1.0, 50, 54.0, 0.1) for i in range(n)
        )
    start = time.perf_counter()
    opened = LabelStore(store.path)
    found = sum(len(opened.keys("m", plan, "d")) for plan in plans)
    return {"labels": found, "seconds": round(time.perf_counter() - start, 2)}


if __name__ == "__main__":
    main()
