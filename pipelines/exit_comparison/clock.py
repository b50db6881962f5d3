"""The contestants on one clock: milliseconds a token and tokens a second at several batch sizes, and each gate's own
cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch

from backbone.execution.apply_plan import apply_plans
from backbone.plan import LayerPlan
from oracle.chat import padded_prompts
from pipelines.exit_comparison.comparison import Comparison, Contestant, described
from pipelines.paired_ratios import paired_ratio, paired_seconds
from pipelines.workspace import Workspace
from runtime.paired_timing import median_seconds
from runtime.token_exits.gates.base import Candidate, Gate
from runtime.token_exits.heads import ExitHeads

GATE_ROUNDS = 20


def compared(workspace: Workspace) -> dict[str, Any]:
    """For `metrics.json`: quality, layers and times of every contestant."""
    comparison = Comparison(workspace)
    found = comparison.contestants()
    rows = described(found)
    for row, times in zip(rows, clocked(workspace, comparison, found), strict=True):
        row["speed"] = times
    settings = workspace.config.token_exits
    return {
        "contestants": rows,
        "depths": list(comparison.material.depths),
        "strategy": settings.strategy,
        "prompts": {"calibrate": len(comparison.calibrate.prompts), "test": len(comparison.test.prompts)},
        "gates": gate_costs(comparison),
        "training": comparison.material.training,
    }


def clocked(workspace: Workspace, comparison: Comparison, found: Sequence[Contestant]) -> list[dict[str, Any]]:
    """For each contestant, by batch size: `ms_a_token`, `tokens_per_s`, and how many times faster it is than the full
    model, from paired rounds. The full model runs stock `generate()`. Prompts and their plans are those of the test
    split, repeated where a batch has more; an allocator's decision is not in these times (`overhead_ms` is)."""
    (model, tokenizer), settings = workspace.adapted, workspace.config.evaluation
    n_tokens, texts = settings.speed_tokens, [prompt.prompt for prompt in comparison.test.prompts]
    exact = {"max_new_tokens": n_tokens, "min_new_tokens": n_tokens, "do_sample": False}
    times: list[dict[str, Any]] = [{} for _ in found]
    for size in workspace.config.token_exits.batches:
        picked = [place % len(texts) for place in range(size)]
        inputs = padded_prompts(tokenizer, [texts[place] for place in picked]).to(model.device)
        work = {place: _generation(model, {**inputs, **exact}, each, picked) for place, each in enumerate(found)}
        rounds = paired_seconds(
            work,
            [(0, place) for place in work],
            rounds=settings.speed_rounds,
            seconds=settings.speed_seconds,
        )
        for place, seconds in rounds.items():
            ratio = paired_ratio(rounds[0], seconds)
            times[place][str(size)] = {
                "ms_a_token": 1000 * median(seconds) / n_tokens,
                "tokens_per_s": size * n_tokens / median(seconds),
                "speedup": ratio.value,
                "interval": [ratio.low, ratio.high],
                "rounds": ratio.rounds,
            }
    return times


def _generation(model: Any, arguments: dict[str, Any], each: Contestant, picked: Sequence[int]) -> Callable[[], object]:
    """What is timed of one contestant. Token exits below plans take the rows of one plan together."""
    plans = None if each.plans is None else [each.plans[place] for place in picked]
    if each.exits is None:

        def run() -> object:
            if plans is None:
                return model.generate(**arguments)
            with apply_plans(model, plans):
                return model.generate(**arguments)

        return run
    exits, groups = each.exits, _by_plan(plans or [None] * len(picked))
    parts = [
        (plan, {name: value[rows] if isinstance(value, torch.Tensor) else value for name, value in arguments.items()})
        for plan, rows in groups.items()
    ]
    return lambda: [exits.generate(model, **own, plan=plan) for plan, own in parts]


def _by_plan(plans: Sequence[LayerPlan | None]) -> dict[LayerPlan | None, list[int]]:
    groups: dict[LayerPlan | None, list[int]] = {}
    for row, plan in enumerate(plans):
        groups.setdefault(plan, []).append(row)
    return groups


@torch.no_grad()
def gate_costs(comparison: Comparison) -> dict[str, dict[str, float]]:
    """Milliseconds in which each gate looks at the rows of a batch at one candidate layer, with its head: by gate and
    batch size, over the shortlist; `entropy of the whole head` reads the whole vocabulary."""
    material = comparison.material
    short, whole = material.bridged, ExitHeads(material.model, material.bridged.bridges)
    gates: dict[str, tuple[Gate, ExitHeads]] = {
        name: (material.gate(name, short), short) for name in material.settings.gates
    }
    gates["entropy of the whole head"] = (material.gate("entropy", whole), whole)
    depth, observed = material.depths[0], material.held_out
    costs: dict[str, dict[str, float]] = {name: {} for name in gates}
    for size in material.settings.batches:
        rows = torch.arange(size) % len(observed.following)
        states, before = observed.states[depth][rows], observed.states[depth - 1][rows]

        def look(gate: Gate, heads: ExitHeads, states: Any = states, before: Any = before, n: int = size) -> object:
            return gate.confidence(Candidate(depth, states, before, torch.arange(n), n, heads))

        work = {name: (lambda pair=pair, look=look: look(*pair)) for name, pair in gates.items()}
        for name, seconds in median_seconds(work, GATE_ROUNDS, lambda: None).items():
            costs[name][str(size)] = 1000 * seconds
    return costs
