"""Stage 8: all policies on the test split, on one driver, and their wall-clock time on this machine."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from controller.certificate.calibration import cheapest_valid_plan
from controller.certificate.certificate import alpha_of
from controller.report.headroom import frontier_card
from controller.report.report_card import ReportCard, regret, report_card
from oracle.frontier.frontier import least_sufficient, static_points, upper_hull
from oracle.frontier.knapsack import cheapest_choices
from oracle.judges import KL
from pipelines.config import Config
from pipelines.evaluation.bands import spot_of
from pipelines.evaluation.controls import comparison, outcome
from pipelines.evaluation.examples import answered_both_ways, check_layers_run
from pipelines.evaluation.learning_table import Table
from pipelines.evaluation.speed import feature_ms, prompt_ms, speeds
from pipelines.evaluation.summary import contributions
from pipelines.run.progress import Omissions
from pipelines.run.prompts import IN_FULL
from pipelines.run.workspace import Workspace
from pipelines.stages.calibrate import priced_out_of_fold
from pipelines.stages.train import load_out_of_fold, load_trained
from runtime.allocator import Allocator
from runtime.paired_timing import machine

RANDOM_DRAWS = 64
"""Draws over which policies that draw plans at random are averaged."""
FEATURE_ROUNDS = 5
"""Times that each set of features is timed."""

Choices = NDArray[np.intp]


def run(workspace: Workspace) -> Path:
    """Writes `metrics.json`, and `choices.json` with every policy's choice for every test prompt."""
    config, menu = workspace.config, workspace.menu()
    test, fit = workspace.table("test"), workspace.table("train", "tune")
    allocator, calibration = Allocator.from_pretrained(workspace.path("allocator")), workspace.read("calibration.json")
    trained = load_trained(workspace, allocator.outliers)
    predicted = {name: learned.predict(test.features) for name, learned in trained.items()}
    keep, best, left_out = allocator.certificate.keep, calibration["best"], Omissions()
    expected = load_out_of_fold(workspace)
    priced = {name: priced_out_of_fold(own, fit, config.calibration, keep) for name, own in expected.items()}
    priced[best] = allocator.certificate.price, allocator.rule
    chosen = {name: rule.choose(predicted[name], price) for name, (price, rule) in priced.items()}
    certified = [menu.plans[plan] for plan in chosen[best]]
    check_layers_run(allocator, *workspace.model.loaded, [prompt.prompt for prompt in test.prompts], certified)
    speed = speeds(workspace, allocator, test, chosen[best])
    examples = answered_both_ways(workspace, allocator, test, chosen[best])
    chosen |= _yardsticks(config, test, fit, chosen[best], keep)
    compared_at_losses, routed = comparison(workspace, best, expected, fit, test, allocator, left_out)
    if routed is not None:
        chosen["task"] = routed
    if headed := [place for place, plan in enumerate(menu.plans) if plan.healed]:
        chosen["full_with_head"] = np.full(len(test.prompts), headed[0])
    layers = [plan.layers for plan in menu.plans]
    cards = {name: _card(choice, test, layers) for name, choice in chosen.items()}
    metrics: dict[str, Any] = {
        name: {**asdict(card), "tokens_per_s": _tokens_per_s(card, speed)} for name, card in cards.items()
    }
    bounds = [alpha_of(level) * test.unit for level in config.calibration.keep]
    for name, own in predicted.items():
        metrics[name]["regret"] = regret(own, test.losses, test.rule, bounds)
        metrics[name]["decision_ms"] = prompt_ms(trained[name].predict, test.features)
    frontier = asdict(frontier_card(chosen[best], test.scores, test.sufficient, test.budgets, alpha_of(keep)))
    metrics |= {
        "best": best,
        "captured_headroom": cards[best].captured_headroom,
        "intervals": {**_intervals(chosen[best], test), "captured_headroom": frontier["captured_headroom"]},
        "frontier": frontier,
        "worst_task": _worst_task(chosen[best], test),
        "judges": dict(Counter(prompt.judge for prompt in test.prompts)),
        "comparison": compared_at_losses,
        "left_out": left_out,
        "outliers": _outliers(allocator, test),
        "healing": {
            "method": workspace.read("adapt.json")["method"],
            "after": {"static": static_points(test.scores, test.budgets)},
        },
        "certificate": calibration["certificate"],
        "certificates": [
            {
                **found,
                "test": outcome(
                    replace(test.rule, plan=found.get("plan")).choose(predicted[best], found["price"]), test
                ),
            }
            for found in calibration["certificates"]
        ],
        "prompts": {
            **{split: len(prompts) for split, prompts in workspace.prompts.labelled_splits.items()},
            "adapt": len(workspace.prompts.splits["adapt"]),
        },
        "labelling": _labelling(workspace),
        "overhead_ms": speed["overhead_ms"],
        "feature_ms": feature_ms(workspace, test.prompts[0].prompt, FEATURE_ROUNDS),
        "speed": speed,
        "examples": examples,
        "model": {
            "source": config.model.source,
            "fingerprint": workspace.model.facts.fingerprint,
            "layers": menu.n_layers,
            "plans": [str(plan) for plan in menu.plans],
        },
        "machine": machine(),
    }
    metrics["contributions"] = contributions(metrics)
    choices = {name: choice[: len(test.prompts)].tolist() for name, choice in chosen.items()}
    workspace.write("choices.json", {"ids": [prompt.id for prompt in test.prompts], "chosen": choices}, indent=None)
    return workspace.write("metrics.json", metrics)


def _intervals(chosen: Choices, test: Table) -> dict[str, dict[str, float | None]]:
    """How far the allocator's figures could be off if other test prompts had been drawn."""
    found = spot_of(test.budgets[chosen], test.scores[np.arange(len(chosen)), chosen], test.scores[:, -1])
    return {name: {"low": own.low, "high": own.high} for name, own in (("kept", found.kept), ("budget", found.budget))}


def _worst_task(chosen: Choices, test: Table) -> dict[str, Any] | None:
    """The task that keeps the least of the full model's mean score, with its interval; None where none has a score."""
    rows = {str(task): np.flatnonzero(test.tasks == task) for task in np.unique(test.tasks)}
    kept = {
        task: float(test.scores[own, chosen[own]].mean() / test.full[own].mean())
        for task, own in rows.items()
        if test.full[own].any()
    }
    if not kept:
        return None
    worst = min(kept, key=lambda task: kept[task])
    interval = _intervals(chosen[rows[worst]], test.rows(rows[worst]))["kept"]
    return {"task": worst, "tasks": len(rows), "n": len(rows[worst]), "kept": {"value": kept[worst], **interval}}


def _yardsticks(config: Config, test: Table, fit: Table, best: Choices, keep: float) -> dict[str, Choices]:
    """The policies that know nothing of the prompt, and the one that knows everything; random ones in many draws."""
    n_prompts, n_plans = test.sufficient.shape
    shares = np.bincount(best, minlength=n_plans) / len(best)
    return {
        "full": np.full(n_prompts, n_plans - 1),
        "best_static": np.full(n_prompts, best_static(config, fit, test, keep)),
        "static_mixture": _draws(_mixture_at(float(test.budgets[best].mean()), fit), n_prompts),
        "random": _draws(shares, n_prompts),
        "oracle": _oracle(test, config.label.tolerance),
    }


def _outliers(allocator: Allocator, test: Table) -> dict[str, float] | None:
    """What the outlier test was asked for, does on the test prompts, and takes; None without one."""
    if (found := allocator.outliers) is None:
        return None
    sent = float(found.are_outliers(test.features).mean())
    return {"rate": found.rate, "sent": sent, "held": found.held, "ms": prompt_ms(found.are_outliers, test.features)}


def _oracle(test: Table, tolerance: float) -> Choices:
    """The cheapest choice that loses no more than `label.tolerance`, made with the scores in hand: on the whole where
    prompts that win make up for others, else on every prompt."""
    if test.risk == "mean_score":
        return cheapest_choices(test.scores, test.budgets, float(test.full.mean()) - tolerance)
    return least_sufficient(test.sufficient)


def _draws(weights: NDArray[np.float64], n_prompts: int) -> Choices:
    """[RANDOM_DRAWS * N] plans drawn with these weights [K], whatever the prompt."""
    return np.random.default_rng(0).choice(len(weights), RANDOM_DRAWS * n_prompts, p=weights)


def best_static(config: Config, tested: Table, others: Table, keep: float | None = None) -> int:
    """The cheapest plan that, run by all, is certified on `tested` as a controller's price is; else the full plan.

    Plans are tested in the order of their losses on other prompts. A run tests on `train` and `tune`, which are
    labelled under every plan and which a static plan has no use for otherwise, in the order of the split `test`.
    `keep`: the bound; None for the first of `calibration.keep`.
    """
    settings = config.calibration
    return cheapest_valid_plan(
        tested.losses,
        settings.alpha if keep is None else alpha_of(keep),
        settings.delta_of_one,
        settings.risk,
        expected=others.losses.mean(axis=0),
        tasks=tested.tasks if settings.per_task else None,
        full=tested.full,
        groups=tested.groups,
    )


def _mixture_at(budget: float, table: Table) -> NDArray[np.float64]:
    """Weights [K] of the two neighbours on the hull of static plans whose mixture has a mean budget."""
    hull = upper_hull(static_points(table.scores, table.budgets))
    means = table.scores.mean(axis=0)
    known = [int(np.flatnonzero((table.budgets == x) & (means == y))[0]) for x, y in hull]
    weights = np.zeros(len(table.budgets))
    upper = min(int(np.searchsorted(table.budgets[known], budget)), len(known) - 1)
    lower = max(upper - 1, 0)
    low, high = table.budgets[known[lower]], table.budgets[known[upper]]
    share = 1.0 if high == low else float(np.clip((budget - low) / (high - low), 0, 1))
    weights[known[lower]] += 1 - share
    weights[known[upper]] += share
    return weights


def _card(chosen: Choices, test: Table, layers: list[float]) -> ReportCard:
    """Of a policy, or of several draws of one; `layers` are the plans' [K]."""
    repeats = len(chosen) // len(test.prompts)
    scores, losses = np.tile(test.scores, (repeats, 1)), np.tile(test.losses, (repeats, 1))
    return report_card(chosen, scores, losses, test.budgets, layers, test.unit)


def _tokens_per_s(card: ReportCard, speed: dict[str, Any]) -> float:
    """New tokens a second if every prompt ran in a full batch of its plan, from the times measured in this run."""
    return float(speed["new_tokens"] * speed["prompts"] / np.dot(card.plan_shares, speed["plan_seconds"]))


def _labelling(workspace: Workspace) -> dict[str, float]:
    """What the labels cost, beside generating every answer under every plan.

    Tokens are weighted by the share of the layers that they pass. Answers that were cut short count in the comparison
    as far as they are known, so that the true ratio is a little lower; under `kl`, where none is generated, as long as
    the full model's. A pass is the full model's over a prompt and its own answer; what prompts share counts once.
    The split `calibrate` is not in these figures; `calibrate_share` is the share of its prompts and
    plans that are labelled.
    """
    menu, calibrate = workspace.menu(), workspace.prompts.labelled("calibrate")
    missing = [len(workspace.labels.missing(calibrate, plan)) for plan in menu.plans]
    shares = [plan.layers / plan.n_layers for plan in menu.plans]
    labels = workspace.labels.read(workspace.prompts.labelled(*IN_FULL), menu)
    spent = sum(label.forward_tokens for row in labels for label in row)
    exhaustive = sum(
        (label.prompt_tokens + len((row[-1] if label.judge == KL else label).answer_ids)) * share
        for row in labels
        for label, share in zip(row, shares, strict=True)
    )
    seconds = sum(label.seconds for row in labels for label in row)
    passes = sum(row[-1].prompt_tokens + len(row[-1].answer_ids) for row in labels)
    return {
        "forward_tokens": round(spent, 1),
        "seconds": round(seconds, 1),
        "ratio_to_exhaustive": round(spent / exhaustive, 3),
        "passes_a_prompt": round(spent / passes, 3),
        "calibrate_share": round(1 - sum(missing) / (len(calibrate) * len(menu)), 3),
    }
