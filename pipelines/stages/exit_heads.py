"""Fit the exit heads of a menu of early exits, and choose targets and plans on held-out prompts."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from backbone.healing.exit_heads import HeadFit, HeadFitter, HeadSettings
from backbone.healing.exit_places import places_bytes, read_places
from backbone.healing.training_targets import Example
from backbone.plan import LayerPlan, PlanMenu
from oracle.batches import spread
from oracle.labels.exit_answers import exit_depth
from oracle.menus.p_median import best_plans
from pipelines.config import ConfigError
from pipelines.config.sections import Targets
from pipelines.run.progress import console, progress

WEIGHTS = {"own": 0.0, "references": 0.7}
"""Weight of the references in the loss; the full model's own distribution has the rest."""
SCREENED = 4
"""Heads of plans that are compared are trained for the steps of a head, divided by this."""
TRIED = 3
"""Depths, evenly spread, at which targets are compared; the other depths are fitted on the better ones alone."""
STATES_BYTES = 2**31
"""Of the states that heads are fitted on, at most; of longer answers fewer texts are read."""


def make_heads(
    model: PreTrainedModel,
    examples: Sequence[Example],
    tasks: Sequence[str],
    menu: PlanMenu,
    targets: Targets,
    count: int | None = None,
) -> tuple[dict[LayerPlan, HeadFit], dict[str, Any]]:
    """A head for each plan of a menu, and how they were fitted; the model runs in full, once over each example.

    With a count, heads trained for a quarter of the steps say which plans are best (see `best_exits`).

    Args:
        model: that the heads are for.
        examples: prompts with their references, or with the model's own answers where they have none.
        tasks: of the examples.
        menu: of early exits and the full model.
        targets: see `AdaptSection.targets`.
        count: plans of the menu that is to be chosen, the full model counted; None for all.

    Raises:
        ConfigError: a plan that is no early exit.
    """
    depths = _depths(menu.plans[:-1])
    start, wanted = time.perf_counter(), sorted({*depths.values()})
    numbers = list(range(len(examples)))
    if (size := places_bytes(model, examples, wanted)) > STATES_BYTES:
        numbers = spread(numbers, max(1, int(len(examples) * STATES_BYTES / size)))
    with progress("prompts for heads", len(numbers)) as advance:
        places = read_places(model, [examples[number] for number in numbers], wanted, advance=advance)
    read = time.perf_counter()
    settings, names = HeadSettings(), list(WEIGHTS) if targets == "auto" else [targets]
    fitter = HeadFitter(model, places, settings)
    screened: dict[str, float] = {}
    if count is not None:
        with progress("heads to compare exits by", len(wanted)) as advance:
            compared = fitter.fit(wanted, WEIGHTS[names[-1]], advance, steps=settings.steps // SCREENED)
        screened = {str(plan): compared[depth].right for plan, depth in depths.items()}
        said = {plan: compared[depth].said for plan, depth in depths.items()}
        best = best_exits(said, menu.budgets[:-1], count)
        depths = {plan: depths[plan] for plan in best}
        wanted = sorted({*depths.values()})
        console.print(f"  of {len(screened)} exits these are best: {', '.join(map(str, depths))}")
    with progress("heads", len(wanted) + (len(names) - 1) * min(TRIED, len(wanted))) as advance:
        tried = spread(wanted, TRIED) if len(names) > 1 else wanted
        found = {name: fitter.fit(tried, WEIGHTS[name], advance) for name in names}
        chosen = max(names, key=lambda name: sum(fit.right for fit in found[name].values()))
        if rest := [depth for depth in wanted if depth not in tried]:
            found[chosen] |= fitter.fit(rest, WEIGHTS[chosen], advance)
    fits, of_texts = found[chosen], [tasks[number] for number in numbers]
    record = {
        "targets": chosen,
        "prompts": len(numbers),
        "places": len(places),
        "seconds": {"states": read - start, "heads": time.perf_counter() - read},
        "screened": screened,
        "fits": {
            name: {str(plan): _described(own[depth], of_texts) for plan, depth in depths.items() if depth in own}
            for name, own in found.items()
        },
    }
    right = ", ".join(f"{plan} {fits[depth].right:.0%}" for plan, depth in depths.items())
    on = "the full model alone" if chosen == "own" else "references too"
    console.print(f"  heads fitted on {on}; held-out answers said: {right}")
    return {plan: fits[depth] for plan, depth in depths.items()}, record


def best_exits(said: Mapping[LayerPlan, Mapping[int, bool]], budgets: Sequence[float], count: int) -> list[LayerPlan]:
    """The plans with which an oracle spends least on held-out texts, and the full depth, cheapest first.

    The oracle gives each text the cheapest plan whose head says the answer, and the full model where none does. The
    full depth stays, so that a report shows what its head alone gains.

    Args:
        said: of each plan, cheapest first, whether its head says the answer of each text.
        budgets: of the plans.
        count: plans that the oracle chooses from, the full model counted.
    """
    texts = next(iter(said.values()))
    scores = np.array([[*(one[text] for one in said.values()), True] for text in texts], dtype=float)
    places = best_plans(scores, np.array([*budgets, 1.0]), count, losses=[0.0])
    return [plan for place, plan in enumerate(said) if place in places or plan.healed]


def _depths(plans: Sequence[LayerPlan]) -> dict[LayerPlan, int]:
    depths = {}
    for plan in plans:
        if (depth := exit_depth(plan)) is None:
            raise ConfigError(
                f"adapt.method=heads fits heads of early exits, and the menu has the plan {plan}; take 'bridges'"
            )
        depths[plan] = depth
    return depths


def _described(fit: HeadFit, tasks: Sequence[str]) -> dict[str, Any]:
    by_task: dict[str, list[bool]] = defaultdict(list)
    for text, is_said in fit.said.items():
        by_task[tasks[text]].append(is_said)
    shares = {task: float(np.mean(said)) for task, said in sorted(by_task.items())}
    loss, wrong = ({"ridge": of[0], "trained": of[1]} for of in (fit.loss, fit.wrong))
    return {"loss": loss, "wrong": wrong, "steps": fit.steps, "right": fit.right, "by_task": shares}
