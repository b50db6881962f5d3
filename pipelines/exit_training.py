"""Train the bridges of early exits further, on what the full model says next at every token of the given texts.

A closed-form bridge brings the state near the full model's; what counts is the token that follows. An exit's whole
model behind its bridge is the final norm and the head, so a step costs as little as these, over a shortlist of tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from transformers import PreTrainedModel

from backbone.plan import LayerPlan
from backbone.stand_ins.bridges import Bridge, Bridges
from backbone.stand_ins.training_targets import Example
from pipelines.progress import progress
from runtime.token_exits.heads import ExitHeads, shortlist_of
from runtime.token_exits.observing import observe
from runtime.token_exits.training import train_bridges

TOKENS = 20_000
"""Of the texts, at most: their states are kept in memory."""
SHORTLIST = 2048
"""Commonest tokens of the texts, over which divergences are taken."""
BATCH = 512
"""Tokens of a step."""


def exits_of(plans: Sequence[LayerPlan]) -> dict[LayerPlan, int]:
    """The plans that run all layers up to one and none behind it, and how many each runs."""
    firsts = {plan: plan.gaps[0].start for plan in plans if plan.gaps}
    return {plan: first for plan, first in firsts.items() if plan == LayerPlan.exiting(plan.n_layers, first)}


def train_exits(
    model: PreTrainedModel,
    sequences: Sequence[Sequence[int]],
    bridges: Bridges,
    steps: int,
) -> tuple[Bridges, dict[str, tuple[float, float]]]:
    """Bridges of which those of early exits are trained; the others stay as they are.

    Args:
        model: whose layers the bridges stand in for, without a plan.
        sequences: token ids of prompts with the model's own answers; evenly picked, of `TOKENS` tokens together.
        bridges: closed-form ones, by plan.
        steps: of the optimiser, for each exit.

    Returns:
        The bridges, and for each exit the divergence (nats a token) on held-out sequences before and after.
    """
    depths = exits_of(list(bridges))
    used = sequences[:: math.ceil(sum(map(len, sequences)) / TOKENS)]
    heads = ExitHeads(
        model, {depth: bridges[plan][depth] for plan, depth in depths.items()}, shortlist_of(used, SHORTLIST)
    )
    whole = [Example(tuple(tokens), len(tokens) - 1) for tokens in used]
    with progress("sequences for exits", len(whole)) as advance:
        observed = observe(model, whole, sorted(depths.values()), advance=advance)
    with progress("training steps of exits", steps * len(depths)) as advance:
        trained, losses = train_bridges(heads, observed, steps=steps, batch=BATCH, advance=advance)
    found: dict[LayerPlan, dict[int, Bridge]] = {plan: dict(of_plan) for plan, of_plan in bridges.items()}
    for plan, depth in depths.items():
        found[plan][depth] = trained[depth]
    return found, {str(plan): losses[depth] for plan, depth in depths.items()}
