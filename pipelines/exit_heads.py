"""Fit the exit heads of a menu of early exits, and choose their targets on held-out prompts."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel

from backbone.plan import LayerPlan
from backbone.stand_ins.exit_heads import HeadFit, HeadSettings, fit_exit_heads, read_places
from backbone.stand_ins.training_targets import Example
from oracle.labels.exit_answers import exit_depth
from pipelines.config import ConfigError
from pipelines.config_sections import Targets
from pipelines.progress import console, progress

OWN, REFERENCES = 0.0, 0.7
"""Weight of the references in the loss; the full model's own distribution has the rest."""


def make_heads(
    model: PreTrainedModel, examples: Sequence[Example], plans: Sequence[LayerPlan], targets: Targets
) -> tuple[dict[LayerPlan, HeadFit], dict[str, Any]]:
    """A head for each plan, and how they were fitted.

    Args:
        model: runs in full, once over each example.
        examples: prompts with their references, or with the model's own answers where they have none.
        plans: early exits.
        targets: see `AdaptSection.targets`.

    Raises:
        ConfigError: a plan that is no early exit.
    """
    depths = {}
    for plan in plans:
        if (depth := exit_depth(plan)) is None:
            raise ConfigError(
                f"adapt.method=heads fits heads of early exits, and the menu has the plan {plan}; take 'bridges'"
            )
        depths[plan] = depth
    start = time.perf_counter()
    with progress("prompts for heads", len(examples)) as advance:
        places = read_places(model, examples, sorted(depths.values()), advance=advance)
    weights = {"own": OWN, "references": REFERENCES}
    wanted = [name for name in weights if targets in (name, "auto")]
    found: dict[str, dict[int, HeadFit]] = {}
    with progress("heads", len(wanted) * len(depths)) as advance:
        for name in wanted:
            settings = HeadSettings(references=weights[name])
            found[name] = fit_exit_heads(model, places, sorted(depths.values()), settings, advance)
    chosen = max(wanted, key=lambda name: sum(fit.right for fit in found[name].values()))
    record = {
        "targets": chosen,
        "prompts": len(examples),
        "places": len(places),
        "seconds": time.perf_counter() - start,
        "fits": {name: {str(plan): _described(fits[depths[plan]]) for plan in plans} for name, fits in found.items()},
    }
    said = ", ".join(f"{plan} {found[chosen][depths[plan]].right:.0%}" for plan in plans)
    on = "the full model alone" if chosen == "own" else "references too"
    console.print(f"  heads fitted on {on}; held-out answers said: {said}")
    return {plan: found[chosen][depths[plan]] for plan in plans}, record


def _described(fit: HeadFit) -> Mapping[str, Any]:
    return {"ridge_loss": fit.loss[0], "loss": fit.loss[1], "right": fit.right}
