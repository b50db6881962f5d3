"""What the menu of several shapes is worth beside menus of one shape, each plan with its bridges, on prompts held out.

    python benchmarks/bridged_menus.py --work /tmp/menus                 # Gemma 3 270M, embedded prompts
    python benchmarks/bridged_menus.py --work DIR --model M --data FILE --name NAME --methods covering exits

One half of the prompts makes the menus and fits the bridges, the other half measures them. For each menu: what the best
mixture of its plans runs at a mean score of 98% and 100% of the full model's, and what an oracle runs that picks one of
them for each prompt, with 90% intervals over redrawn prompts; and in how many of these the first method's oracle runs
no more than each other's. Labels are kept in the folder --work, where a stopped run goes on. Writes
benchmarks/results/bridged-menus-NAME.json.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import workload
from numpy.typing import NDArray

from backbone.families import model_fingerprint
from backbone.healing.fit_bridges import bridges_of, fit_bridges
from backbone.healing.healing import Healing
from backbone.loading import load_backbone
from backbone.plan import LayerPlan, PlanMenu
from oracle.frontier.bootstrap import percentile_interval
from oracle.frontier.frontier import Frontiers, budget_at
from oracle.frontier.sweep import sweep
from oracle.labels.labeller import Labeller
from oracle.labels.reader import score_matrix
from oracle.labels.store import LabelStore
from oracle.menus import MENUS, build_menu
from oracle.menus.base import MenuTask, TaskLabels

RESULTS = Path(__file__).parent / "results"
KEPT = (1.0, 0.98)
REDRAWS, LEVEL = 400, 0.9


def main() -> None:
    options = workload.parser(__doc__ or "", prompts=200)
    options.set_defaults(search_prompts=200)
    options.add_argument("--work", type=Path, required=True)
    options.add_argument("--methods", nargs="+", choices=sorted(MENUS), default=["covering", "exits", "gaps"])
    options.add_argument("--plans", type=int, default=8)
    options.add_argument("--probe-depth", type=int, default=4)
    options.add_argument("--cheapest-budget", type=float, default=0.5)
    arguments = options.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load_backbone(arguments.model, device=arguments.device)
    searched, prompts = workload.split(arguments)
    decoding = workload.decoding_of(arguments)

    def labeller(healing: Healing | None) -> Labeller:
        store = LabelStore(arguments.work / "labels.db")
        return Labeller(model, tokenizer, decoding, store, arguments.batch_size, healing)

    scored, others = searched[::2], searched[1::2]
    full = LayerPlan.full(model.config.get_text_config().num_hidden_layers)
    labels = TaskLabels(labeller, tokenizer, scored, others, full)
    shape = (arguments.probe_depth, arguments.plans, arguments.cheapest_budget)
    task = MenuTask(model, tokenizer, [p.prompt for p in scored], decoding, *shape, labels=labels)
    everyone = TaskLabels(labeller, tokenizer, scored, searched, full)
    measured = {}
    for method in arguments.methods:
        start = time.perf_counter()
        menu = build_menu(method, task)
        built = time.perf_counter()
        menu, healing = bridged(model, menu, everyone)
        healed = labeller(healing)
        healed.label(prompts, menu)
        measured[method] = (menu, score_matrix(healed.read(prompts, menu)))
        print(f"{method}: {built - start:.0f} s, then {time.perf_counter() - built:.0f} s; {menu.plans}", flush=True)
    result = {method: figures(menu, scores) for method, (menu, scores) in measured.items()}
    first, *rest = arguments.methods
    result[first]["no_more_than"] = {other: no_more(measured[first], measured[other]) for other in rest}
    for method, found in result.items():
        print(method, found["mixture"], found["oracle"], found.get("no_more_than", ""))
    del arguments.work
    workload.write(RESULTS / f"bridged-menus-{arguments.name}.json", arguments, {"menus": result})


def bridged(model: Any, menu: PlanMenu, labels: TaskLabels) -> tuple[PlanMenu, Healing]:
    """The menu with the costs of its bridges, which are fitted on the task's prompts, and these."""
    fitted = bridges_of(fit_bridges(model, labels.sequences(), menu.plans[:-1]))
    healing = Healing(model_fingerprint(model), fitted)
    return menu.keeping({str(plan): healing.cost(model, plan) for plan in menu.plans[:-1]}), healing


def figures(menu: PlanMenu, scores: NDArray[np.float64]) -> dict[str, Any]:
    """Budgets of mixture and oracle at the scores in `KEPT`, (value, low, high)."""
    frontiers = redrawn(menu, scores, [np.ones(len(scores)), *drawn(len(scores))])
    found: dict[str, Any] = {"plans": [str(plan) for plan in menu.plans], "budgets": list(menu.budgets)}
    found["quality"] = (scores.mean(axis=0) / scores[:, -1].mean()).tolist()
    for name in ("mixture", "oracle"):
        found[name] = {}
        for kept in KEPT:
            values = np.array([budget_at(getattr(f, name), kept * f.full) for f in frontiers])
            interval = percentile_interval(values[1:], LEVEL)
            found[name][f"{kept:.0%}"] = [round(float(value), 4) for value in (values[0], *interval)]
    return found


def no_more(own: tuple[PlanMenu, Any], other: tuple[PlanMenu, Any]) -> dict[str, float]:
    """Share of the redrawn sets of prompts in which the first oracle runs no more than the second."""
    draws = drawn(len(own[1]))
    spent = [
        np.array([[budget_at(f.oracle, kept * f.full) for kept in KEPT] for f in redrawn(menu, scores, draws)])
        for menu, scores in (own, other)
    ]
    return {f"{kept:.0%}": float((spent[0] <= spent[1])[:, place].mean()) for place, kept in enumerate(KEPT)}


def redrawn(menu: PlanMenu, scores: NDArray[np.float64], draws: Sequence[NDArray[np.float64]]) -> list[Frontiers]:
    budgets = np.array(menu.budgets)
    steps = sweep(scores, budgets)
    return [Frontiers.of(scores, budgets, steps, counts) for counts in draws]


def drawn(n: int) -> list[NDArray[np.float64]]:
    """How often each of n prompts counts, in each redrawn set."""
    random = np.random.default_rng(0)
    return [np.bincount(random.integers(0, n, n), minlength=n).astype(np.float64) for _ in range(REDRAWS)]


if __name__ == "__main__":
    main()
