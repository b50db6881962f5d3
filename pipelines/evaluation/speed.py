"""Speed-ups of test prompts: under every plan, and with the allocator against stock `generate()`.

A ratio comes from paired rounds, in each of which everything is timed once, with an interval for its median.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from statistics import median
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import binom
from transformers import PreTrainedModel

from backbone.execution.apply_plan import apply_plan
from backbone.execution.delete_layers import delete_layers
from backbone.execution.prompt_prefix import probe_states
from backbone.healing.healing import Healing
from backbone.plan import LayerPlan
from controller.features import Features, extract, rows_of
from oracle.chat import padded_prompts
from pipelines.evaluation.learning_table import Table
from pipelines.run.progress import progress
from pipelines.run.workspace import Workspace
from runtime.allocator import Allocator
from runtime.paired_timing import median_seconds, seconds_of

Choices = NDArray[np.intp]
Name = TypeVar("Name")
Inputs = Mapping[str, torch.Tensor]

NOISE = 1.03
"""A speed-up above what the layers left out allow, by more than this factor, is noise and is reported as such."""
FEWEST_ROUNDS = 5
"""With five paired rounds the smallest and the largest ratio hold the median between them in 94 of 100 cases."""
EXACT = 0.03
"""Half of an interval, as a share of its ratio, below which more rounds are not worth their time."""
LEVEL = 0.9


@dataclass(frozen=True, slots=True)
class Ratio:
    """How many times faster one thing is than another, over paired rounds.

    Attributes:
        value: median.
        low, high: ends of an interval that holds the true median with a probability of at least 90%; None where there
            are too few rounds for one.
        rounds: how many.
    """

    value: float
    low: float | None
    high: float | None
    rounds: int

    @property
    def is_exact(self) -> bool:
        return self.low is not None and self.high is not None and (self.high - self.low) / 2 <= EXACT * self.value

    @property
    def exceeds_noise(self) -> bool:
        """Whether the figure is worth printing: it is exact, or its interval leaves no doubt on which side of 1."""
        if self.low is None or self.high is None:
            return False
        return self.is_exact or not self.low <= 1 <= self.high

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "exceeds_noise": self.exceeds_noise}


def paired_ratio(yardstick: Sequence[float], seconds: Sequence[float]) -> Ratio:
    """How many times faster than a yardstick, from seconds of both in the same rounds.

    The interval is that of order statistics for a median, which assumes nothing of the noise (Conover 1999, Practical
    Nonparametric Statistics, section 3.2).
    """
    ratios = sorted(a / b for a, b in zip(yardstick, seconds, strict=True))
    n, value = len(ratios), float(median(ratios))
    cut = int(binom.ppf((1 - LEVEL) / 2, n, 0.5))
    return Ratio(value, ratios[cut - 1], ratios[n - cut], n) if cut else Ratio(value, None, None, n)


def paired_seconds(
    work: Mapping[Name, Callable[[], object]],
    pairs: Sequence[tuple[Name, Name]],
    *,
    rounds: int,
    seconds: float,
    advance: Callable[[], None] = lambda: None,
) -> dict[Name, list[float]]:
    """Times of each piece of work, each once a round, after a round of warm-up.

    Args:
        work: what is timed, by name.
        pairs: (yardstick, other) whose ratios are wanted; once all are exact no further round begins.
        rounds: at most so many.
        seconds: no round begins later than this, once there are `FEWEST_ROUNDS`.
        advance: called after each piece of work.
    """
    found: dict[Name, list[float]] = {name: [] for name in work}
    began = time.perf_counter()
    for done in range(rounds + 1):
        kept = done - 1
        exact = kept >= FEWEST_ROUNDS and all(paired_ratio(found[a], found[b]).is_exact for a, b in pairs)
        if exact or (kept >= FEWEST_ROUNDS and time.perf_counter() - began > seconds):
            break
        for name, run in work.items():
            took = seconds_of(run)
            if done:
                found[name].append(took)
            advance()
    return found


def generation_under(
    model: PreTrainedModel, inputs: Inputs, plan: LayerPlan, n_tokens: int, healing: Healing | None
) -> Callable[[], object]:
    """Greedy generation of exactly `n_tokens` for each row of `inputs` under a plan with its healing."""

    def generate() -> object:
        with apply_plan(model, plan, healing):
            return model.generate(**inputs, max_new_tokens=n_tokens, min_new_tokens=n_tokens, do_sample=False)  # type: ignore[operator]

    return generate


def speeds(workspace: Workspace, allocator: Allocator, test: Table, chosen: Choices) -> dict[str, Any]:
    """Times of some test prompts: under every plan, and with the allocator against stock `generate()`.

    `batch` is all of them at once, `single` one after the other. The prompts are picked evenly along the plans chosen
    for them, so that a few stand for all. `limit` is what the layers left out allow one at a time: each prompt on a
    model without the layers that its plan, as `generate()` runs it, leaves out, and without a decision.
    """
    (model, tokenizer), settings = workspace.model.loaded, workspace.config.evaluation
    timed = replace(allocator, drift=None)  # the same prompts over and over are no served requests
    n_tokens, picked = settings.speed_tokens, timed_rows(chosen, settings.speed_prompts)
    texts = [test.prompts[index].prompt for index in picked]
    batch = dict(padded_prompts(tokenizer, texts).to(model.device))
    singles = [dict(padded_prompts(tokenizer, [text]).to(model.device)) for text in texts]
    ran = [timed.allocate(model, **one)[0] for one in singles]  # rounding: for a few not what a larger batch chooses
    exact = {"max_new_tokens": n_tokens, "min_new_tokens": n_tokens, "do_sample": False}
    shortened = {
        str(plan): generation_under(model, batch, plan, n_tokens, timed.healing) for plan in timed.menu.plans[:-1]
    }
    ends: dict[str, Callable[[], object]] = {
        "stock_batch": lambda: model.generate(**batch, **exact),  # type: ignore[operator]
        "allocator_batch": lambda: timed.generate(model, **batch, **exact),
        "stock_single": lambda: [model.generate(**one, **exact) for one in singles],  # type: ignore[operator]
        "allocator_single": lambda: [timed.generate(model, **one, **exact) for one in singles],
        "allocate_single": lambda: [timed.allocate(model, **one) for one in singles],
        "shortened_single": _shortened(model, singles, ran, timed.healing, exact),
    }
    plans = [*shortened, "stock_batch"]  # which runs the full plan
    pairs = {
        "single": ("stock_single", "allocator_single"),
        "batch": ("stock_batch", "allocator_batch"),
        "limit": ("stock_single", "shortened_single"),
        "of_limit": ("shortened_single", "allocator_single"),
        **{name: ("stock_batch", name) for name in plans},
    }
    with progress("timings", (settings.speed_rounds + 1) * (len(shortened) + len(ends))) as advance:
        rounds = paired_seconds(
            {**shortened, **ends},
            list(pairs.values()),
            rounds=settings.speed_rounds,
            seconds=settings.speed_seconds,
            advance=lambda: advance(1),
        )
    ratios = {name: paired_ratio(rounds[a], rounds[b]) for name, (a, b) in pairs.items()}
    seconds = {name: median(times) for name, times in rounds.items()}
    budgets = dict(zip(timed.menu.plans, timed.menu.budgets, strict=True))
    limit = len(ran) / sum(budgets[plan] for plan in ran)
    return {
        "prompts": len(texts),
        "prompt_tokens": float(batch["attention_mask"].sum(-1).float().mean()),
        "new_tokens": n_tokens,
        "dtype": str(model.dtype),
        "rounds": ratios["single"].rounds,
        "plan_seconds": [seconds[name] for name in plans],
        "seconds": {name: seconds[name] for name in ends},
        "speedup_single": ratios["single"].value,
        "speedup_limit": limit,
        "credible": ratios["single"].value <= limit * NOISE,
        "speedup_batch": ratios["batch"].value,
        "intervals": {how: ratios[how].to_json() for how in ("single", "batch")},
        "limit": ratios["limit"].to_json(),
        "of_limit": ratios["of_limit"].to_json(),
        "plan_intervals": [ratios[name].to_json() for name in plans],
        "overhead_ms": seconds["allocate_single"] * 1000 / len(texts),
    }


def timed_rows(chosen: Choices, count: int) -> list[int]:
    """Rows of the prompts to time: `count` at most, evenly along the plans chosen for all of them [N]."""
    order, count = np.argsort(chosen, kind="stable"), min(count, len(chosen))
    return [int(order[int((i + 0.5) * len(order) / count)]) for i in range(count)]


def _shortened(
    model: PreTrainedModel,
    singles: list[dict[str, torch.Tensor]],
    plans: list[LayerPlan],
    healing: Healing | None,
    exact: dict[str, Any],
) -> Callable[[], object]:
    """Stock generation for each prompt on a model in which the layers that its plan leaves out do not exist; a plan
    that runs half of a layer is applied instead, which takes the same time within 2%."""
    halves = {plan for plan in plans if plan.attention != plan.mlp}
    short = {plan: model if plan in halves else delete_layers(model, plan) for plan in {*plans}}

    def generate() -> object:
        for one, plan in zip(singles, plans, strict=True):
            with apply_plan(model, plan, healing) if plan in halves else nullcontext():
                short[plan].generate(**one, **exact)  # type: ignore[operator]
        return None

    return generate


def prompt_ms(decide: Callable[[Features], object], features: Features, repeats: int = 50) -> float:
    """Median milliseconds that something takes for the features of one prompt, after a warm-up; prompts take turns."""
    ones = [rows_of(features, np.array([row])) for row in range(min(repeats, len(next(iter(features.values())))))]
    work: dict[int, Callable[[], object]] = {row: partial(decide, one) for row, one in enumerate(ones)}
    return 1000 * median(median_seconds(work, 3, lambda: None).values())


def feature_ms(workspace: Workspace, text: str, rounds: int) -> dict[str, float]:
    """Milliseconds that each set of features takes for one prompt, from the probe layers' states in hand."""
    (model, tokenizer), config = workspace.model.loaded, workspace.config
    inputs = dict(padded_prompts(tokenizer, [text]).to(model.device))
    states = probe_states(model, inputs["input_ids"], inputs["attention_mask"], config.menu.probe_depth)
    work = {
        name: partial(extract, model, states, inputs["input_ids"], inputs["attention_mask"], [name])
        for name in config.features.sets
    }
    seconds = median_seconds(work, rounds, lambda: None)
    return {name: round(value * 1000, 4) for name, value in seconds.items()}
