"""Methods that propose plans: from the number of layers alone, as the user wrote them down, or by greedy removal."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel

from backbone.families import sublayer_bytes
from backbone.plan import LayerPlan
from oracle.batches import spread
from oracle.chat import tokens_of
from oracle.labels.generation import answer_batch
from oracle.labels.verification import Row, diverge
from oracle.menus.base import Advance, MenuTask
from oracle.search.searchers import one_layer_less

TRIED_EXITS = 16
"""Early exits that heads are fitted for, at most."""
GAP_LENGTHS = 8
"""Lengths of gaps that are tried, at most."""

MAX_TOKENS = 4
"""Tokens of each answer that count, so that one long answer does not outweigh many short ones."""

BATCH = 4
"""Prompts of like length that run together, so that little is padded."""


def given(task: MenuTask, advance: Advance) -> list[LayerPlan]:
    """The plans that the user wrote down."""
    return [LayerPlan.parse(text, task.n_layers) for text in task.given]


def exits(task: MenuTask, advance: Advance) -> list[LayerPlan]:
    """Early exits, evenly spread from the cheapest budget to the last layer."""
    return [LayerPlan.exiting(task.n_layers, count) for count in task.counts]


def heads(task: MenuTask, advance: Advance) -> list[LayerPlan]:
    """Early exits and the full depth, all with heads to be fitted, of which the stage `adapt` keeps the best."""
    counts = spread(range(task.fewest_layers, task.n_layers), TRIED_EXITS)
    full = range(task.n_layers)
    return [
        *(LayerPlan.exiting(task.n_layers, count) for count in counts),
        LayerPlan(task.n_layers, frozenset(full), frozenset(full), healed=True),
    ]


def evenly(task: MenuTask, advance: Advance) -> list[LayerPlan]:
    """Evenly spread skips, the last layer kept (Unified Layer Skipping, Liu et al. 2024, arXiv 2404.06954, sec. 3)."""
    counts = spread(range(max(task.probe_depth + 1, task.fewest_layers), task.n_layers), task.n_plans - 1)
    return [LayerPlan.evenly(task.n_layers, count, probe_depth=task.probe_depth) for count in counts]


def gaps(task: MenuTask, advance: Advance) -> list[LayerPlan]:
    """One gap of neighbouring layers, of lengths and at places evenly spread from the probe layers to the last."""
    longest = task.n_layers - task.fewest_layers
    lengths = spread(range(1, longest + 1), max(1, min(GAP_LENGTHS, task.n_plans - 1)))
    places = max(1, (task.n_plans - 1) // len(lengths))
    return [
        LayerPlan.skipping(task.n_layers, range(first, first + length))
        for length in lengths
        for first in spread(range(task.probe_depth, task.n_layers - length + 1), places)
    ]


def greedy(task: MenuTask, advance: Advance) -> list[LayerPlan]:
    """The plans on the way down from the full one, each less the layer whose loss changes the full model's next-token
    distributions least."""
    sizes, removable, batches = (
        sublayer_bytes(task.model),
        range(task.probe_depth, task.n_layers),
        answered_batches(task),
    )
    path = [LayerPlan.full(task.n_layers)]
    while path[-1].budget(sizes) > task.cheapest_budget and (tried := one_layer_less(path[-1], removable)):
        lost = mean_divergences(task.model, batches, tried)
        path.append(min(tried, key=lambda plan: (lost[plan], str(plan))))
        for _ in tried:
            advance()
    return spread(path[1:], task.n_plans - 1)


def answered_batches(task: MenuTask) -> list[list[Row]]:
    """The task's prompts with the beginnings of the full model's answers, in batches."""
    ordered = sorted(task.prompts, key=lambda text: len(tokens_of(task.tokenizer, text)))
    full, batches = LayerPlan.full(task.n_layers), list[list[Row]]()
    for start in range(0, len(ordered), BATCH):
        texts = ordered[start : start + BATCH]
        answers = answer_batch(task.model, task.tokenizer, texts, full, task.decoding)
        rows = zip(texts, answers, strict=True)
        batches.append([(tokens_of(task.tokenizer, text), answer.token_ids[:MAX_TOKENS]) for text, answer in rows])
    return batches


def mean_divergences(
    model: PreTrainedModel, batches: Sequence[Sequence[Row]], plans: Sequence[LayerPlan]
) -> dict[LayerPlan, float]:
    """Of each plan the mean KL(full || plan) in nats over the tokens of all answers."""
    sums, tokens = dict.fromkeys(plans, 0.0), 0
    for rows in batches:
        for (_, answer), row in zip(rows, diverge(model, rows, plans), strict=True):
            tokens += len(answer)
            for plan, found in row.items():
                sums[plan] += found.nats * len(answer)
    return {plan: total / tokens for plan, total in sums.items()}
