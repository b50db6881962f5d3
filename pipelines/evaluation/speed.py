"""Times of some test prompts on this machine's clock: under every plan, and with the allocator against stock."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from backbone.execution.apply_plan import apply_plan
from backbone.execution.delete_layers import delete_layers
from backbone.execution.prompt_prefix import probe_states
from backbone.plan import LayerPlan
from controller.features import Features, extract, rows_of
from oracle.chat import padded_prompts
from pipelines.evaluation.learning_table import Table
from pipelines.evaluation.paired_ratios import Ratio, generation_under, paired_ratio, paired_seconds
from pipelines.run.progress import progress
from pipelines.run.workspace import Workspace
from runtime.allocator import Allocator
from runtime.paired_timing import median_seconds

NOISE = 1.03
"""A speed-up above what the layers left out allow, by more than this factor, is noise and is reported as such."""

Choices = NDArray[np.intp]


def speeds(workspace: Workspace, allocator: Allocator, test: Table, chosen: Choices) -> dict[str, Any]:
    """Times of some test prompts: under every plan, and with the allocator against stock `generate()`.

    `batch` is all of them at once, `single` one after the other. The prompts are picked evenly along the plans chosen
    for them, so that a few stand for all. `limit` is what the layers left out allow one at a time: each prompt on a
    model without the layers that its plan leaves out, and without a decision.
    """
    (model, tokenizer), settings = workspace.adapted, workspace.config.evaluation
    timed = replace(allocator, drift=None)  # the same prompts over and over are no served requests
    n_tokens, picked = settings.speed_tokens, timed_rows(chosen, settings.speed_prompts)
    texts = [test.prompts[index].prompt for index in picked]
    batch = dict(padded_prompts(tokenizer, texts).to(model.device))
    singles = [dict(padded_prompts(tokenizer, [text]).to(model.device)) for text in texts]
    exact = {"max_new_tokens": n_tokens, "min_new_tokens": n_tokens, "do_sample": False}
    plans = {str(plan): generation_under(model, batch, plan, n_tokens) for plan in timed.menu.plans}
    ends: dict[str, Callable[[], object]] = {
        "stock_batch": lambda: model.generate(**batch, **exact),  # type: ignore[operator]
        "allocator_batch": lambda: timed.generate(model, **batch, **exact),
        "stock_single": lambda: [model.generate(**one, **exact) for one in singles],  # type: ignore[operator]
        "allocator_single": lambda: [timed.generate(model, **one, **exact) for one in singles],
        "allocate_single": lambda: [timed.allocate(model, **one) for one in singles],
        "shortened_single": _shortened(model, singles, [timed.menu.plans[chosen[index]] for index in picked], exact),
    }
    full = list(plans)[-1]
    pairs = [
        *((f"stock_{how}", f"allocator_{how}") for how in ("single", "batch")),
        ("stock_single", "shortened_single"),
        ("shortened_single", "allocator_single"),
        *((full, name) for name in plans),
    ]
    with progress("timings", (settings.speed_rounds + 1) * (len(plans) + len(ends))) as advance:
        rounds = paired_seconds(
            {**plans, **ends},
            pairs,
            rounds=settings.speed_rounds,
            seconds=settings.speed_seconds,
            advance=lambda: advance(1),
        )
    ratios = {pair: paired_ratio(rounds[pair[0]], rounds[pair[1]]) for pair in pairs}
    seconds = {name: median(times) for name, times in rounds.items()}
    single, limit = ratios[pairs[0]], 1 / float(test.budgets[chosen[picked]].mean())
    return {
        "prompts": len(texts),
        "prompt_tokens": float(batch["attention_mask"].sum(-1).float().mean()),
        "new_tokens": n_tokens,
        "dtype": str(model.dtype),
        "rounds": single.rounds,
        "plan_seconds": [seconds[name] for name in plans],
        "seconds": {name: seconds[name] for name in ends},
        "speedup_single": single.value,
        "speedup_limit": limit,
        "credible": single.value <= limit * NOISE,
        "speedup_batch": ratios[pairs[1]].value,
        "intervals": {how: described(ratios[pair]) for how, pair in zip(("single", "batch"), pairs, strict=False)},
        "limit": described(ratios[pairs[2]]),
        "of_limit": described(ratios[pairs[3]]),
        "plan_intervals": [described(ratios[full, name]) for name in plans],
        "overhead_ms": seconds["allocate_single"] * 1000 / len(texts),
    }


def timed_rows(chosen: Choices, count: int) -> list[int]:
    """Rows of the prompts to time: `count` at most, evenly along the plans chosen for all of them [N]."""
    order, count = np.argsort(chosen, kind="stable"), min(count, len(chosen))
    return [int(order[int((i + 0.5) * len(order) / count)]) for i in range(count)]


def _shortened(
    model: PreTrainedModel, singles: list[dict[str, torch.Tensor]], plans: list[LayerPlan], exact: dict[str, Any]
) -> Callable[[], object]:
    """Stock generation for each prompt on a model in which the layers that its plan leaves out do not exist; a plan
    that runs half of a layer is applied instead, which takes the same time within 2%."""
    halves = {plan for plan in plans if plan.attention != plan.mlp}
    short = {plan: model if plan in halves else delete_layers(model, plan) for plan in {*plans}}

    def generate() -> object:
        for one, plan in zip(singles, plans, strict=True):
            with apply_plan(model, plan) if plan in halves else nullcontext():
                short[plan].generate(**one, **exact)  # type: ignore[operator]
        return None

    return generate


def described(ratio: Ratio) -> dict[str, Any]:
    """For JSON: the ratio, its interval, and whether it is worth printing."""
    return {**asdict(ratio), "exceeds_noise": ratio.exceeds_noise}


def prompt_ms(decide: Callable[[Features], object], features: Features, repeats: int = 50) -> float:
    """Median milliseconds that something takes for the features of one prompt, after a warm-up.

    Args:
        repeats: times that it is timed.
        decide: what is timed.
        features: of N prompts, which take turns.
    """
    ones = [rows_of(features, np.array([row])) for row in range(min(repeats, len(next(iter(features.values())))))]
    work: dict[int, Callable[[], object]] = {row: partial(decide, one) for row, one in enumerate(ones)}
    return 1000 * median(median_seconds(work, 3, lambda: None).values())


def feature_ms(workspace: Workspace, text: str, rounds: int) -> dict[str, float]:
    """Milliseconds that each set of features takes for one prompt, from the probe layers' states in hand."""
    (model, tokenizer), config = workspace.backbone, workspace.config
    inputs = dict(padded_prompts(tokenizer, [text]).to(model.device))
    states = probe_states(model, inputs["input_ids"], inputs["attention_mask"], config.menu.probe_depth)
    work = {
        name: partial(extract, model, states, inputs["input_ids"], inputs["attention_mask"], [name])
        for name in config.features.sets
    }
    seconds = median_seconds(work, rounds, lambda: None)
    return {name: round(value * 1000, 4) for name, value in seconds.items()}
