"""Search: remove, step by step, what changes the full model's next-token distributions least."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from backbone.execution.shared_passes import SharedPasses, sharing_order
from backbone.families import sublayer_bytes
from backbone.fingerprint import model_fingerprint
from backbone.healing.attaching import Healing, attach, detach
from backbone.healing.fit_bridges import bridges_of, fit_bridges
from backbone.plan import LayerPlan
from oracle.chat import tokens_of
from oracle.labels.generate_answers import answer_batch
from oracle.labels.teacher_forcing import ForcedAnswers
from oracle.menus.base import Advance, MenuTask
from oracle.spread import spread

Removal = tuple[set[int], set[int]]
"""Layers whose attention goes, and layers whose MLP goes."""


def greedy_layers(task: MenuTask, advance: Advance) -> list[LayerPlan]:
    """Removes layers, one at a time."""
    divergence = AnswerDivergence(task)
    return _search(task, layer_removals(task), lambda plans: divergence.of(plans, advance))


def greedy_sublayers(task: MenuTask, advance: Advance) -> list[LayerPlan]:
    """As `greedy_layers`, but attention and MLP of a layer go one at a time."""
    divergence = AnswerDivergence(task)
    return _search(task, sublayer_removals(task), lambda plans: divergence.of(plans, advance))


def bridged_layers(task: MenuTask, advance: Advance) -> list[LayerPlan]:
    """As `greedy_layers`, but every plan that is tried runs with bridges, fitted on the prompts of the task.

    Leaves the model without healing parts.
    """
    divergence, fingerprint = AnswerDivergence(task), model_fingerprint(task.model)
    sequences = _answered(task)

    def measured(plans: list[LayerPlan]) -> dict[LayerPlan, float]:
        attach(task.model, Healing(fingerprint, bridges_of(fit_bridges(task.model, sequences, plans))))
        try:
            return divergence.of(plans, advance)
        finally:
            detach(task.model)

    return _search(task, layer_removals(task), measured)


def _answered(task: MenuTask) -> list[list[int]]:
    """Token ids of the task's prompts with the full model's answers."""
    texts, full = sorted(task.prompts, key=len), LayerPlan.full(task.n_layers)
    batches = [texts[i : i + AnswerDivergence.BATCH] for i in range(0, len(texts), AnswerDivergence.BATCH)]
    return [
        [*tokens_of(task.tokenizer, text), *answer.token_ids]
        for batch in batches
        for text, answer in zip(
            batch, answer_batch(task.model, task.tokenizer, batch, full, task.decoding), strict=True
        )
    ]


def layer_removals(task: MenuTask) -> list[Removal]:
    return [({i}, {i}) for i in range(task.probe_depth, task.n_layers)]


def sublayer_removals(task: MenuTask) -> list[Removal]:
    layers = range(task.probe_depth, task.n_layers)
    attention: list[Removal] = [({i}, set()) for i in layers]
    mlp: list[Removal] = [(set(), {i}) for i in layers]
    return attention + mlp


def _search(
    task: MenuTask, removals: Sequence[Removal], measured: Callable[[list[LayerPlan]], dict[LayerPlan, float]]
) -> list[LayerPlan]:
    """The plans on the way down from the full one, each less the removal that costs least by what is `measured`."""
    sizes, path = sublayer_bytes(task.model), [LayerPlan.full(task.n_layers)]
    while path[-1].budget(sizes) > task.cheapest_budget and (tried := shortened(path[-1], removals)):
        costs = measured(tried)
        path.append(min(tried, key=lambda plan: (costs[plan], str(plan))))
    return spread(path[1:], task.n_plans - 1)


def shortened(plan: LayerPlan, removals: Sequence[Removal]) -> list[LayerPlan]:
    """The plan less each of the removals that it still runs."""
    return [
        plan.without(attention=attention, mlp=mlp)
        for attention, mlp in removals
        if attention <= plan.attention and mlp <= plan.mlp
    ]


class AnswerDivergence:
    """How far a plan's next-token distributions lie from the full model's, along the full model's own answers.

    Mean KL(full || plan) in nats over the answer tokens of a few prompts. Plans that are measured together share the
    computation of the layers with which they begin.
    """

    MAX_TOKENS = 4
    """Tokens of each answer that count, so that one long answer does not outweigh many short ones."""

    BATCH = 4
    """Prompts of like length that run together, so that little is padded."""

    def __init__(self, task: MenuTask) -> None:
        self._model = task.model
        ordered = sorted(task.prompts, key=lambda text: len(tokens_of(task.tokenizer, text)))
        groups = [ordered[i : i + self.BATCH] for i in range(0, len(ordered), self.BATCH)]
        self._batches = [self._forced(task, group) for group in groups]
        full = [LayerPlan.full(task.n_layers)]
        self._full = [self._log_probabilities(batch, SharedPasses(self._model, full)) for batch in self._batches]

    def of(self, plans: Sequence[LayerPlan], advance: Advance = lambda: None) -> dict[LayerPlan, float]:
        """The divergence of each plan; `advance` is called once a plan."""
        plans = sharing_order(self._model, plans)
        sums = [0.0] * len(plans)
        for number, (batch, full) in enumerate(zip(self._batches, self._full, strict=True)):
            shared = SharedPasses(self._model, plans)
            for index in range(len(plans)):
                other = self._log_probabilities(batch, shared)
                sums[index] += float((full.exp() * (full - other)).sum())
                if number == len(self._batches) - 1:
                    advance()
        return {plan: total / sum(map(len, self._full)) for plan, total in zip(plans, sums, strict=True)}

    def _forced(self, task: MenuTask, prompts: Sequence[str]) -> ForcedAnswers:
        full = LayerPlan.full(task.n_layers)
        answers = answer_batch(task.model, task.tokenizer, prompts, full, task.decoding)
        return ForcedAnswers(
            task.model, task.tokenizer, prompts, [answer.token_ids[: self.MAX_TOKENS] for answer in answers]
        )

    def _log_probabilities(self, batch: ForcedAnswers, shared: SharedPasses) -> torch.Tensor:
        """[T, vocabulary] for the T answer tokens of a batch under the next plan, in float32."""
        with shared.next_plan():
            return torch.cat(batch.logits()).float().log_softmax(-1)
