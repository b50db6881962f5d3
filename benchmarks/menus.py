"""Which plans are best when all prompts run them, and how much more an oracle could save by choosing for each prompt.

    python benchmarks/menus.py                                   # Gemma 3 270M, embedded prompts
    python benchmarks/menus.py --data MIXED.jsonl --name mixed   # other prompts
    python benchmarks/menus.py --model FOLDER --name qwen --methods evenly greedy --cheapest-budget 0.88

For each method: mean score of its plans against their budget, as static plans. For the oracle that picks one of all
these plans for each prompt: the budget at equal mean score, and, for a score that can be halved (the share of the full
model's answer tokens that a plan would say too, even against odd ones), budgets with and without split-half correction.
Writes benchmarks/results/menus-NAME.json.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import workload
from static_plans import compare, quality_at
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from backbone.families import sublayer_bytes
from backbone.loading import load_backbone
from backbone.plan import LayerPlan, PlanMenu
from oracle.chat import tokens_of
from oracle.frontier.frontier import (
    budget_at,
    equal_mean_budget,
    oracle_hull,
    own_score_budget,
    static_points,
    sufficient_plans,
    upper_hull,
)
from oracle.frontier.split_half import split_half
from oracle.labels.labeller import Labeller
from oracle.labels.reader import score_matrix
from oracle.labels.store import LabelStore
from oracle.labels.verification import verify
from oracle.menus import MENUS
from oracle.menus.base import MenuTask
from oracle.prompts import Prompt

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    options = workload.parser(__doc__ or "", prompts=96)
    options.add_argument("--methods", nargs="+", choices=sorted(MENUS), default=[m for m in MENUS if m != "given"])
    options.add_argument("--plans", type=int, default=8)
    options.add_argument("--cheapest-budget", type=float, default=0.5)
    arguments = options.parse_args()
    model, tokenizer = load_backbone(arguments.model, device=arguments.device)
    decoding = workload.decoding_of(arguments)
    searched, prompts = workload.split(arguments)
    texts = [prompt.prompt for prompt in searched]
    task = MenuTask(model, tokenizer, texts, decoding, 4, arguments.plans, arguments.cheapest_budget)
    start, seconds = time.perf_counter(), {}
    with tempfile.TemporaryDirectory() as folder:
        store = LabelStore(Path(folder) / "labels.db")
        labeller = Labeller(model, tokenizer, decoding, store, arguments.batch_size)

        def done(method: str) -> None:
            seconds[method] = round(time.perf_counter() - start - sum(seconds.values()), 1)
            print(f"{method}: {seconds[method]} s", flush=True)

        found = compare(arguments.methods, task, labeller, prompts, done)
        menu = PlanMenu.build({LayerPlan.parse(row.plan, task.n_layers) for row in found}, sublayer_bytes(model), 4)
        oracle = oracle_of(model, tokenizer, labeller, prompts, menu)
    best = {}
    for method in arguments.methods:
        plans = [row for row in found if row.method == method]
        best[method] = {f"{budget:.2f}": round(quality_at(plans, budget), 4) for budget in (0.95, 0.9, 0.85, 0.75)}
        print(f"{method:<18}" + "  ".join(f"{key}: {value:6.1%}" for key, value in best[method].items()))
    print(json.dumps(oracle))
    result = {"seconds": seconds, "quality_at_budget": best, "oracle": oracle, "plans": list(map(asdict, found))}
    workload.write(RESULTS / f"menus-{arguments.name}.json", arguments, result)


def oracle_of(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    labeller: Labeller,
    prompts: Sequence[Prompt],
    menu: PlanMenu,
) -> dict[str, Any]:
    """The oracle over the plans of all methods together."""
    budgets = np.array(menu.budgets)
    labels = labeller.read(prompts, menu)
    scores, answers = score_matrix(labels), [row[-1].answer_ids for row in labels]
    known = [(tokens_of(tokenizer, prompt.prompt), answer) for prompt, answer in zip(prompts, answers, strict=True)]
    rows = verify(model, known, menu.plans)
    matches = [[row[plan].matches for plan in menu.plans] for row in rows if len(row[menu.plans[-1]].matches) > 1]
    even, odd = (np.array([[np.mean(m[half::2]) for m in row] for row in matches]) for half in (0, 1))
    whole = np.array([[np.mean(m) for m in row] for row in matches])
    at_loss = []
    for loss in (0.05, 0.1, 0.2):
        curves = {
            "static_mixture": upper_hull(static_points(whole, budgets)),
            "oracle": oracle_hull(whole, budgets),
            # its picks alone may never get there: they are mixed with the full plan, whose loss is 0
            "oracle_split_half": [*split_half(even, odd, budgets), (1.0, 1.0)],
        }
        at_loss.append({"loss": loss} | {name: round(budget_at(curve, 1 - loss), 4) for name, curve in curves.items()})
    return {
        "plans": len(menu),
        "prompts": len(prompts),
        "equal_mean_budget": round(equal_mean_budget(scores, budgets), 4),
        "own_score_budget": round(own_score_budget(sufficient_plans(scores), budgets), 4),
        "budget_at_loss_of_tokens": at_loss,
    }


if __name__ == "__main__":
    main()
