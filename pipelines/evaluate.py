"""Stage 7: all policies on the test split, on one driver, and what they cost on this machine's clock."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from controller.base import Controller, choose
from controller.constant import MixtureController, OracleController
from controller.frontier_card import frontier_card
from controller.report_card import ReportCard, report_card
from oracle.frontier import static_points, upper_hull
from pipelines.calibrate import certify
from pipelines.config import Config
from pipelines.frozen import before_and_after
from pipelines.progress import progress
from pipelines.stages import write_atomically
from pipelines.train import load_trained
from pipelines.workspace import Table, Workspace
from runtime.allocator import Allocator
from runtime.measuring import generation_under, machine, median_seconds, prompt_inputs

RANDOM_DRAWS = 64
"""Draws over which policies that draw plans at random are averaged."""

NOISE = 1.03
"""A speed-up above what the layers left out allow, by more than this factor, is noise and is reported as such."""

Choices = NDArray[np.intp]


def run(config: Config) -> Path:
    """Writes `metrics.json`, and `choices.json` with every policy's choice for every test prompt."""
    workspace = Workspace.of(config)
    test, calibrate = workspace.table("test"), workspace.table("calibrate")
    allocator = Allocator.from_pretrained(workspace.path("allocator"))
    calibration = json.loads(workspace.path("calibration.json").read_text())
    projection, controllers = load_trained(workspace)
    features = projection(test.features)
    chosen = {
        name: _decide(controller, calibration["certificates"][name]["threshold"], features)
        for name, controller in controllers.items()
    }
    best = calibration["best"]
    speed = _speeds(workspace, allocator, test, chosen[best])
    chosen |= _yardsticks(config, test, calibrate, features, chosen[best])
    cards = {name: _card(workspace, choice, test) for name, choice in chosen.items()}
    metrics: dict[str, Any] = {
        name: {**asdict(card), "tokens_per_s": _tokens_per_s(card, speed, config)} for name, card in cards.items()
    }
    metrics |= {
        "best": best,
        "captured_headroom": cards[best].captured_headroom,
        "frontier": asdict(frontier_card(chosen[best], test.scores, test.sufficient, test.budgets)),
        "stand_ins": before_and_after(workspace, test),
        "certificate": {**calibration["certificates"][best], "sentence": allocator.certificate.sentence},
        "prompts": {split: len(prompts) for split, prompts in workspace.splits.items()},
        "labelling": _labelling(workspace),
        "overhead_ms": speed["overhead_ms"],
        "speed": speed,
        "model": {"source": config.model.source, "fingerprint": workspace.fingerprint},
        "machine": machine(),
    }
    write_atomically(workspace.path("metrics.json"), json.dumps(metrics, indent=2) + "\n")
    choices = {name: choice[: len(test.prompts)].tolist() for name, choice in chosen.items()}
    data = {"ids": [prompt.id for prompt in test.prompts], "chosen": choices}
    write_atomically(workspace.path("choices.json"), json.dumps(data) + "\n")
    return workspace.path("metrics.json")


def _decide(controller: Controller, threshold: float | None, features: NDArray[np.float32]) -> Choices:
    """A threshold of None, no certificate, demands more than any shortened plan can give."""
    return choose(controller.predict(features), float("inf") if threshold is None else threshold)


def _yardsticks(
    config: Config, test: Table, calibrate: Table, features: NDArray[np.float32], best: Choices
) -> dict[str, Choices]:
    """The policies that know nothing of the prompt, and the one that knows everything; random ones in many draws."""
    n_plans = len(test.budgets)
    oracle = OracleController()
    oracle.fit(features, test.sufficient, test.budgets.astype(np.float32))
    shares = (np.bincount(best, minlength=n_plans) / len(best)).tolist()
    mixture = _mixture_at(float(test.budgets[best].mean()), calibrate)
    return {
        "full": _decide(MixtureController.static(n_plans, n_plans - 1), 0.5, features),
        "best_static": _decide(_best_static(config, calibrate), 0.5, features),
        "static_mixture": _draws(mixture, features),
        "random": _draws(shares, features),
        "oracle": _decide(oracle, 0.5, features),
    }


def _draws(weights: list[float], features: NDArray[np.float32]) -> Choices:
    """[RANDOM_DRAWS * N] plans drawn with these weights."""
    draws = [MixtureController(weights, seed).predict(features) for seed in range(RANDOM_DRAWS)]
    return choose(np.concatenate(draws), 0.5)


def _best_static(config: Config, calibrate: Table) -> MixtureController:
    """The cheapest plan that, run by all, is certified like a controller's threshold; the full plan if none is."""
    n_plans = len(calibrate.budgets)
    features = np.zeros((len(calibrate.prompts), 1), dtype=np.float32)
    for index in range(n_plans - 1):
        static = MixtureController.static(n_plans, index)
        if certify(static.predict(features), calibrate, config).threshold is not None:
            return static
    return MixtureController.static(n_plans, n_plans - 1)


def _mixture_at(budget: float, table: Table) -> list[float]:
    """Weights [K] of the two neighbours on the hull of static plans whose mixture has a mean budget."""
    hull = upper_hull(static_points(table.scores, table.budgets))
    known = [int(np.flatnonzero(table.budgets == x)[0]) for x, _ in hull]
    weights = np.zeros(len(table.budgets))
    upper = min(int(np.searchsorted(table.budgets[known], budget)), len(known) - 1)
    lower = max(upper - 1, 0)
    low, high = table.budgets[known[lower]], table.budgets[known[upper]]
    share = 1.0 if high == low else float(np.clip((budget - low) / (high - low), 0, 1))
    weights[known[lower]] += 1 - share
    weights[known[upper]] += share
    return weights.tolist()


def _card(workspace: Workspace, chosen: Choices, test: Table) -> ReportCard:
    repeats = len(chosen) // len(test.prompts)
    layers = [plan.layers for plan in workspace.menu().plans]
    scores, sufficient = np.tile(test.scores, (repeats, 1)), np.tile(test.sufficient, (repeats, 1))
    return report_card(chosen, scores, sufficient, test.budgets, layers)


def _speeds(workspace: Workspace, allocator: Allocator, test: Table, chosen: Choices) -> dict[str, Any]:
    """Times of some test prompts: under every plan, and with the allocator against stock `generate()`.

    `batch` is all of them at once, `single` one after the other. The prompts are picked evenly along the plans chosen
    for them, so that a few stand for all.
    """
    (model, tokenizer), settings = workspace.adapted, workspace.config.evaluation
    n_prompts, n_tokens = min(settings.speed_prompts, len(chosen)), settings.speed_tokens
    order = np.argsort(chosen, kind="stable")
    picked = [order[int((i + 0.5) * len(order) / n_prompts)] for i in range(n_prompts)]
    texts = [test.prompts[index].prompt for index in picked]
    batch = prompt_inputs(model, tokenizer, texts)
    singles = [prompt_inputs(model, tokenizer, [text]) for text in texts]
    exact = {"max_new_tokens": n_tokens, "min_new_tokens": n_tokens, "do_sample": False}
    plans = {str(plan): generation_under(model, batch, plan, n_tokens) for plan in allocator.menu.plans}
    ends: dict[str, Callable[[], object]] = {
        "stock_batch": lambda: model.generate(**batch, **exact),  # type: ignore[operator]
        "allocator_batch": lambda: allocator.generate(model, **batch, **exact),
        "stock_single": lambda: [model.generate(**one, **exact) for one in singles],  # type: ignore[operator]
        "allocator_single": lambda: [allocator.generate(model, **one, **exact) for one in singles],
        "allocate_single": lambda: [allocator.allocate(model, **one) for one in singles],
    }
    with progress("timings", (settings.speed_rounds + 1) * (len(plans) + len(ends))) as advance:
        seconds = median_seconds({**plans, **ends}, settings.speed_rounds, lambda: advance(1))
    speedup = seconds["stock_single"] / seconds["allocator_single"]
    limit = 1 / float(test.budgets[chosen[picked]].mean())
    return {
        "prompts": len(texts),
        "prompt_tokens": float(batch["attention_mask"].sum(-1).float().mean()),
        "new_tokens": n_tokens,
        "dtype": str(model.dtype),
        "plan_seconds": [seconds[name] for name in plans],
        "seconds": {name: seconds[name] for name in ends},
        "speedup_single": speedup,
        "speedup_limit": limit,
        "credible": speedup <= limit * NOISE,
        "speedup_batch": seconds["stock_batch"] / seconds["allocator_batch"],
        "overhead_ms": seconds["allocate_single"] * 1000 / len(texts),
    }


def _tokens_per_s(card: ReportCard, speed: dict[str, Any], config: Config) -> float:
    """New tokens a second if every prompt ran in a full batch of its plan, from the times measured in this run."""
    seconds = float(np.dot(card.plan_shares, speed["plan_seconds"])) / speed["prompts"]
    return float(config.evaluation.speed_tokens / seconds)


def _labelling(workspace: Workspace) -> dict[str, float]:
    """What the labels cost, beside generating every answer under every plan.

    Tokens are weighted by the share of the layers that they pass. Answers that were cut short count in the comparison
    as far as they are known, so that the true ratio is a little lower.
    """
    menu = workspace.menu()
    shares = [plan.layers / plan.n_layers for plan in menu.plans]
    labels = workspace.labeller.read(workspace.prompts, menu)
    spent = sum(label.forward_tokens for row in labels for label in row)
    exhaustive = sum(
        (label.prompt_tokens + len(label.answer_ids)) * share
        for row in labels
        for label, share in zip(row, shares, strict=True)
    )
    seconds = sum(label.seconds for row in labels for label in row)
    return {
        "forward_tokens": round(spent, 1),
        "seconds": round(seconds, 1),
        "ratio_to_exhaustive": round(spent / exhaustive, 3),
    }
