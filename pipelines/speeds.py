"""Times of some test prompts on this machine's clock: under every plan, and with the allocator against stock."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backbone.probing import probe_states
from controller.features import extract
from pipelines.progress import progress
from pipelines.workspace import Table, Workspace
from runtime.allocator import Allocator
from runtime.measuring import generation_under, median_seconds, prompt_inputs

NOISE = 1.03
"""A speed-up above what the layers left out allow, by more than this factor, is noise and is reported as such."""

Choices = NDArray[np.intp]


def speeds(workspace: Workspace, allocator: Allocator, test: Table, chosen: Choices) -> dict[str, Any]:
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


def feature_ms(workspace: Workspace, text: str, rounds: int) -> dict[str, float]:
    """Milliseconds that each set of features takes for one prompt, from the probe layers' states in hand."""
    (model, tokenizer), config = workspace.backbone, workspace.config
    inputs = prompt_inputs(model, tokenizer, [text])
    states = probe_states(model, inputs["input_ids"], inputs["attention_mask"], config.menu.probe_depth)
    work = {
        name: partial(extract, model, states, inputs["input_ids"], inputs["attention_mask"], [name])
        for name in config.features.sets
    }
    seconds = median_seconds(work, max(rounds, 5), lambda: None)
    return {name: round(value * 1000, 4) for name, value in seconds.items()}
