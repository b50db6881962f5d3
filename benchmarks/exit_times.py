"""Times of the contestants of `exit_contestants`, and each gate's own cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from exit_material import Material

from backbone.execution.apply_plan import apply_plans
from backbone.healing.healing import Healing
from backbone.plan import LayerPlan
from oracle.chat import padded_prompts
from pipelines.evaluation.speed import paired_ratio, paired_seconds
from runtime.paired_timing import median_seconds
from token_exits.gates import Candidate
from token_exits.heads import ExitHeads

if TYPE_CHECKING:
    from exit_contestants import Comparison, Contestant

GATE_ROUNDS = 20


def by_plan(plans: Sequence[LayerPlan | None]) -> dict[LayerPlan | None, list[int]]:
    """The rows of each plan."""
    groups: dict[LayerPlan | None, list[int]] = {}
    for row, plan in enumerate(plans):
        groups.setdefault(plan, []).append(row)
    return groups


def clocked(comparison: Comparison, found: Sequence[Contestant], batches: Sequence[int]) -> list[dict[str, Any]]:
    """For each contestant, by batch size, its milliseconds a token and its speed to stock `generate()`.

    Prompts and their plans are those of the test split, repeated where a batch has more. An allocator's decision is not
    in these times (`overhead_ms` of the run's metrics is).
    """
    workspace = comparison.material.workspace
    (model, tokenizer), settings = workspace.model.loaded, workspace.config.evaluation
    n_tokens, texts = settings.speed_tokens, [prompt.prompt for prompt in comparison.test.prompts]
    exact = {"max_new_tokens": n_tokens, "min_new_tokens": n_tokens, "do_sample": False}
    times: list[dict[str, Any]] = [{} for _ in found]
    for size in batches:
        picked = [place % len(texts) for place in range(size)]
        inputs = padded_prompts(tokenizer, [texts[place] for place in picked]).to(model.device)
        work = {
            place: _generation(model, {**inputs, **exact}, each, picked, workspace.healing)
            for place, each in enumerate(found)
        }
        pairs, limits = [(0, place) for place in work], (settings.speed_rounds, settings.speed_seconds)
        rounds = paired_seconds(work, pairs, rounds=limits[0], seconds=limits[1])
        for place, seconds in rounds.items():
            ratio = paired_ratio(rounds[0], seconds)
            times[place][str(size)] = {"ms_a_token": 1000 * median(seconds) / n_tokens, **asdict(ratio)}
    return times


def _generation(
    model: Any, arguments: dict[str, Any], each: Contestant, picked: Sequence[int], healing: Healing
) -> Callable[[], object]:
    """What is timed of one contestant. Token exits below plans take the rows of one plan together."""
    plans = None if each.plans is None else [each.plans[place] for place in picked]
    if each.exits is None:

        def run() -> object:
            if plans is None:
                return model.generate(**arguments)
            with apply_plans(model, plans, healing):
                return model.generate(**arguments)

        return run
    exits, groups = each.exits, by_plan(plans or [None] * len(picked))
    parts = [
        (plan, {name: value[rows] if isinstance(value, torch.Tensor) else value for name, value in arguments.items()})
        for plan, rows in groups.items()
    ]
    return lambda: [exits.generate(model, **own, plan=plan, healing=healing) for plan, own in parts]


@torch.no_grad()
def gate_costs(material: Material, batches: Sequence[int]) -> dict[str, dict[str, float]]:
    """Milliseconds in which each gate looks at a batch at one candidate layer, with its head, by batch size.

    They read the shortlist; `entropy of the whole head` reads the whole vocabulary.
    """
    whole = ExitHeads(material.model, material.bridged.bridges)
    pairs = {name: (material.gate(name, material.bridged), material.bridged) for name in material.gates}
    pairs["entropy of the whole head"] = (material.gate("entropy", whole), whole)
    depth, states = material.depths[0], material.held_out.states
    costs: dict[str, dict[str, float]] = {name: {} for name in pairs}
    for size in batches:
        rows = torch.arange(size) % len(states[depth])
        seen = (states[depth][rows], states[depth - 1][rows], torch.arange(size), size)
        work = {
            name: lambda gate=gate, heads=heads, seen=seen: gate.confidence(Candidate(depth, *seen, heads))
            for name, (gate, heads) in pairs.items()
        }
        for name, seconds in median_seconds(work, GATE_ROUNDS, lambda: None).items():
            costs[name][str(size)] = 1000 * seconds
    return costs
