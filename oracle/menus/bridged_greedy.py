"""Greedy search among plans that run with bridges over their gaps."""

from __future__ import annotations

from backbone.execution.shared_passes import sharing_order
from backbone.families import sublayer_bytes
from backbone.fingerprint import model_fingerprint
from backbone.plan import LayerPlan
from backbone.stand_ins.attaching import StandIns, attach, detach
from backbone.stand_ins.fit_bridges import bridges_of, fit_bridges
from oracle.chat import tokens_of
from oracle.labels.generate_answers import answer_batch
from oracle.menus.base import Advance, MenuTask
from oracle.menus.greedy import AnswerDivergence, layer_removals, shortened
from oracle.spread import spread


def bridged_layers(task: MenuTask, advance: Advance) -> list[LayerPlan]:
    """As `greedy_layers`, but every plan that is tried runs with bridges, fitted on the prompts of the task.

    Leaves the model without stand-ins.
    """
    sizes, full = sublayer_bytes(task.model), LayerPlan.full(task.n_layers)
    divergence, fingerprint = AnswerDivergence(task), model_fingerprint(task.model)
    sequences = _answered(task, full)
    path = [full]
    while path[-1].budget(sizes) > task.cheapest_budget and (tried := shortened(path[-1], layer_removals(task))):
        attach(task.model, StandIns(fingerprint, bridges_of(fit_bridges(task.model, sequences, tried))))
        try:
            order = sharing_order(task.model, tried)
            costs = dict(zip(order, divergence.of(order, advance), strict=True))
        finally:
            detach(task.model)
        path.append(min(tried, key=lambda plan: (costs[plan], str(plan))))
    return spread(path[1:], task.n_plans - 1)


def _answered(task: MenuTask, full: LayerPlan) -> list[list[int]]:
    """Token ids of the task's prompts with the full model's answers."""
    texts = sorted(task.prompts, key=len)
    batches = [texts[i : i + AnswerDivergence.BATCH] for i in range(0, len(texts), AnswerDivergence.BATCH)]
    return [
        [*tokens_of(task.tokenizer, text), *answer.token_ids]
        for batch in batches
        for text, answer in zip(
            batch, answer_batch(task.model, task.tokenizer, batch, full, task.decoding), strict=True
        )
    ]
