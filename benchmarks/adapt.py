"""What bridges and adapters make of a frozen model's shortened plans: quality, oracle, price, and other tasks.

    python benchmarks/adapt.py --model gemma --data MIXED.jsonl --name gemma-mixed --max-new-tokens 24 --stop
    python benchmarks/adapt.py --model FOLDER --methods none bridges --train 200 --test 64 --name qwen

For each menu and method, on the same test prompts: mean score of every plan, run by all, and the oracle's budgets that
choose a plan for each prompt. Budgets count the bridges. `both+references` also trains towards the references.
`bridges/other` and the like are made without the prompts of the tasks in --leave-out, and scored on these tasks alone,
beside the same method with them. Decoding is timed step by step in turn with the same model with those layers deleted.
Everything slow is kept in --work and done once, so a killed run goes on. Writes benchmarks/results/adapt-NAME.json.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import workload
from decode import MODELS, Variant, paired
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from backbone.execution.delete_layers import delete_layers
from backbone.families import model_fingerprint
from backbone.healing.distillation import distil
from backbone.healing.fit_bridges import bridges_of, fit_bridges
from backbone.healing.healing import Healing
from backbone.healing.settings import DistillSettings
from backbone.healing.training_targets import Example
from backbone.loading import load_backbone
from backbone.plan import LayerPlan, PlanMenu
from oracle.answered_prompts import answered_examples, reference_examples
from oracle.frontier.frontier import (
    budget_at,
    equal_mean_budget,
    own_score_budget,
    static_points,
    sufficient_plans,
    upper_hull,
)
from oracle.labels.labeller import Labeller
from oracle.labels.reader import score_matrix
from oracle.labels.store import LabelStore
from oracle.menus import MENUS, build_menu
from oracle.menus.base import MenuTask
from oracle.prompts import Prompt, load_prompts

RESULTS = Path(__file__).parent / "results"
METHODS = ("none", "bridges", "bridges_in_order", "bridges_low_rank", "adapter", "both", "both+references")


def main() -> None:
    options = workload.parser(__doc__ or "", prompts=0)
    options.add_argument("--train", type=int, default=350, help="prompts to fit and train on, evenly of all tasks")
    options.add_argument("--test", type=int, default=105)
    options.add_argument("--menus", nargs="+", choices=sorted(MENUS), default=["exits", "evenly", "greedy"])
    options.add_argument("--methods", nargs="+", choices=METHODS, default=["none", "bridges", "adapter", "both"])
    options.add_argument("--leave-out", nargs="*", default=[], help="tasks")
    options.add_argument("--leave-out-methods", nargs="*", choices=METHODS, default=["bridges"])
    options.add_argument("--plans", type=int, default=7)
    options.add_argument("--cheapest-budget", type=float, default=0.5)
    options.add_argument("--probe-depth", type=int, default=4)
    options.add_argument("--epochs", type=float, default=2.0)
    options.add_argument("--minutes", type=float, help="train for so long, instead of so many epochs")
    options.add_argument("--plans-per-step", type=int, default=6)
    options.add_argument("--decode-steps", type=int, default=12)
    options.add_argument("--work", type=Path, default=Path("runs/adapt-benchmark"))
    arguments = options.parse_args()
    model, tokenizer = load_backbone(MODELS.get(arguments.model, arguments.model), device=arguments.device)
    bench = Bench(model, tokenizer, arguments)
    rows = []
    for menu_method in arguments.menus:
        menu = bench.menu(menu_method)
        for method in arguments.methods:
            rows.append({"menu": menu_method, "method": method, **bench.row(menu_method, menu, method)})
            print(shown(rows[-1]), flush=True)
    result = {"full_score": rows[0]["quality"][-1], "rows": rows, "other_tasks": bench.other_tasks()}
    result["decode"] = bench.decode()
    del arguments.work, arguments.prompts
    workload.write(RESULTS / f"adapt-{arguments.name}.json", arguments, result)


class Bench:
    """One model, its prompts, and what was made and labelled so far."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, arguments: Any) -> None:
        self.model, self.tokenizer, self.arguments = model, tokenizer, arguments
        self.work = arguments.work / arguments.name
        self.work.mkdir(parents=True, exist_ok=True)
        self.decoding = workload.decoding_of(arguments)
        self.test, self.train = splits(load_prompts(arguments.data), arguments.test, arguments.train)

    def labeller(self, healing: Healing | None) -> Labeller:
        store = LabelStore(self.work / "labels.db")
        return Labeller(self.model, self.tokenizer, self.decoding, store, self.arguments.batch_size, healing)

    def menu(self, method: str) -> PlanMenu:
        path = self.work / f"menu-{method}.json"
        if not path.exists():
            arguments = self.arguments
            texts = [prompt.prompt for prompt in self.train[:: len(self.train) // arguments.search_prompts]]
            task = MenuTask(
                self.model, self.tokenizer, texts, self.decoding, arguments.probe_depth, arguments.plans,
                arguments.cheapest_budget,
            )  # fmt: skip
            build_menu(method, task).save(path)
        return PlanMenu.load(path)

    def row(self, name: str, menu: PlanMenu, method: str) -> dict[str, Any]:
        """Static plans and oracle of one method over one menu."""
        healing, made = self.healing(name, menu, method, self.train)
        scores, budgets = self.scores(menu, healing, self.test)
        quality = scores.mean(axis=0)
        curve = upper_hull(static_points(scores, budgets))
        plain = [b for b, q in zip(menu.budgets, quality.tolist(), strict=True) if q >= 0.98 * quality[-1]]
        return {
            "plans": [str(plan) for plan in menu.plans],
            "layers": [plan.layers for plan in menu.plans],
            "budgets": np.round(budgets, 4).tolist(),
            "quality": np.round(quality, 4).tolist(),
            "quality_ratio": np.round(quality / quality[-1], 4).tolist(),
            "cheapest_static_layers_at_98": round(min(plain), 4),
            "static_mixture_at_98": round(budget_at(curve, 0.98 * float(quality[-1])), 4),
            "oracle_equal_mean": round(equal_mean_budget(scores, budgets), 4),
            "oracle_own_score": round(own_score_budget(sufficient_plans(scores), budgets), 4),
            "tasks": self.by_task(scores),
            **made,
        }

    def by_task(self, scores: np.ndarray) -> dict[str, list[float]]:
        rows = defaultdict(list)
        for prompt, row in zip(self.test, scores, strict=True):
            rows[prompt.task].append(row)
        return {task: np.round(np.mean(some, axis=0), 4).tolist() for task, some in sorted(rows.items())}

    def scores(self, menu: PlanMenu, healing: Healing, prompts: Sequence[Prompt]) -> tuple[np.ndarray, np.ndarray]:
        """Scores [N, K] of prompts, and the budgets [K] with the bridges counted."""
        labeller = self.labeller(healing)
        labeller.label(prompts, menu)
        scores = score_matrix(labeller.read(prompts, menu))
        costs = [healing.cost(self.model, plan) for plan in menu.plans]
        return scores, np.array(menu.budgets) + costs

    def healing(
        self, name: str, menu: PlanMenu, method: str, prompts: Sequence[Prompt], extra: str = ""
    ) -> tuple[Healing, dict[str, Any]]:
        """Made once: the second time they are read."""
        folder = self.work / f"{name}-{method}{extra}"
        folder.mkdir(exist_ok=True)
        if not (folder / "made.json").exists():
            start = time.perf_counter()
            healing, made = self.make(menu, method, prompts, folder)
            healing.save(folder / "healing.safetensors")
            made["seconds"] = round(time.perf_counter() - start, 1)
            (folder / "made.json").write_text(json.dumps(made))
        return Healing.load(folder / "healing.safetensors"), json.loads((folder / "made.json").read_text())

    def make(
        self, menu: PlanMenu, method: str, prompts: Sequence[Prompt], folder: Path
    ) -> tuple[Healing, dict[str, Any]]:
        fingerprint, plans = model_fingerprint(self.model), menu.plans[:-1]
        if method == "none":
            return Healing(fingerprint), {}
        examples, bridges = self.examples(prompts), {}
        if method != "adapter":
            form = "low_rank" if method == "bridges_low_rank" else "full"
            sequences = [example.tokens[:-1] for example in examples]
            fits = fit_bridges(self.model, sequences, plans, form=form, in_order=method == "bridges_in_order")  # type: ignore[arg-type]
            bridges = bridges_of(fits)
            if method.startswith("bridges"):
                return Healing(fingerprint, bridges), {"tokens": sum(map(len, sequences))}
        settings = DistillSettings(
            epochs=self.arguments.epochs,
            minutes=self.arguments.minutes,
            plans_per_step=self.arguments.plans_per_step,
            evaluate_every=20,
        )
        if method == "both+references":
            examples += reference_examples(self.tokenizer, prompts, self.decoding)
        healing, history = distil(
            self.model, examples, plans, bridges, menu.probe_depth, settings, folder, fingerprint,
            lambda h: print(h.steps[-1], {plan: round(loss, 3) for plan, loss in h.held[-1].items()}, flush=True),
        )  # fmt: skip
        curve = [{"minutes": s / 60, "held": held} for s, held in zip(history.seconds, history.held, strict=True)]
        rate = history.tokens / history.seconds[-1]
        return healing, {"tokens": history.tokens, "plan_tokens_per_s": rate, "curve": curve}

    def examples(self, prompts: Sequence[Prompt]) -> list[Example]:
        full = LayerPlan.full(self.menu(self.arguments.menus[0]).n_layers)
        return answered_examples(self.labeller(None), self.tokenizer, prompts, full)

    def other_tasks(self) -> list[dict[str, Any]]:
        """Methods of the first menu, made without some tasks, on these tasks: quality ratios with and without them."""
        left_out = self.arguments.leave_out
        if not left_out:
            return []
        name = self.arguments.menus[0]
        menu, rows = self.menu(name), []
        others = [prompt for prompt in self.train if prompt.task not in left_out]
        asked = [prompt for prompt in self.test if prompt.task in left_out]
        for method in self.arguments.leave_out_methods:
            known, _ = self.healing(name, menu, method, self.train)
            unknown, _ = self.healing(name, menu, method, others, extra="-other")
            ratios = {}
            for key, healing in (("frozen", Healing(known.fingerprint)), ("with", known), ("without", unknown)):
                quality = self.scores(menu, healing, asked)[0].mean(axis=0)
                ratios[key] = np.round(quality / quality[-1], 4).tolist()
            rows.append({"method": method, "tasks": left_out, "layers": [p.layers for p in menu.plans], **ratios})
            print(json.dumps(rows[-1]), flush=True)
        return rows

    def decode(self) -> list[dict[str, Any]]:
        """Time of a decoding step under the middle plan of the first menu, to the deleted model's."""
        name = self.arguments.menus[0]
        menu = self.menu(name)
        plan = menu.plans[len(menu) // 2]
        deleted, rows = delete_layers(self.model, plan), []
        for batch in (1, 8):
            variants = {"deleted": Variant(deleted, None, "eager")}
            for method in self.arguments.methods:
                variants[method] = Variant(self.model, plan, "eager", self.healing(name, menu, method, self.train)[0])
            prompts = torch.randint(
                3, min(1000, self.model.config.vocab_size), (batch, 64), generator=torch.Generator().manual_seed(0)
            )
            for step in range(-1, self.arguments.decode_steps):
                order = list(variants.values()) if step % 2 else list(reversed(variants.values()))
                for variant in order:
                    if step < 0:
                        variant.prefill(prompts.to(self.model.device), self.arguments.decode_steps)
                    else:
                        variant.step()
            yardstick = variants["deleted"].decode_ms[2:]
            ratios = {m: paired(v.decode_ms[2:], yardstick) for m, v in variants.items() if m != "deleted"}
            rows.append({"batch": batch, "plan": str(plan), "to_deleted": ratios})
            print(json.dumps(rows[-1]), flush=True)
        return rows


def splits(prompts: Sequence[Prompt], test: int, train: int) -> tuple[list[Prompt], list[Prompt]]:
    """Test and train prompts, evenly of all tasks, by the hash of the prompt."""
    tasks = defaultdict(list)
    for prompt in sorted(prompts, key=lambda prompt: prompt.hash):
        tasks[prompt.task].append(prompt)
    n_test, n_train = test // len(tasks), train // len(tasks)
    parts = [(some[:n_test], some[n_test : n_test + n_train]) for some in tasks.values()]
    return [p for part, _ in parts for p in part], [p for _, part in parts for p in part]


def shown(row: dict[str, Any]) -> str:
    plans = "  ".join(f"{n:g}: {q:.0%}" for n, q in zip(row["layers"], row["quality_ratio"], strict=True))
    return (
        f"{row['menu']:<15} {row['method']:<16} {plans}  | 98% from {row['cheapest_static_layers_at_98']:.0%} of the "
        f"layers; oracle {row['oracle_equal_mean']:.0%} equal mean, {row['oracle_own_score']:.0%} own score"
    )


if __name__ == "__main__":
    main()
