"""The judge `kl`: how far a plan's next-token distributions lie from the full model's, along the full model's answer.

Needs no reference and generates nothing: one teacher-forced pass for each plan, in which plans that begin with the same
layers share their computation. It sees a plan weaken long before its arg-max changes, and says nothing about where the
plan's own answer would have gone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from backbone.execution.shared_passes import SharedPasses, sharing_order
from backbone.left_padding import in_halves
from backbone.plan import LayerPlan
from oracle.labels.teacher_forcing import ForcedAnswers
from oracle.labels.verification import Forced, compared, fitting


@dataclass(frozen=True, slots=True)
class Divergence:
    """One plan along one answer of the full model.

    Attributes:
        nats: mean of KL(full || plan) over the answer's tokens.
        ids: what the plan, decoding greedily by itself, would say: of the answer what it repeats, then its own token.
        forward_tokens: as in `Label`; the full model's pass is shared out among the plans.
    """

    nats: float
    ids: tuple[int, ...]
    forward_tokens: float

    @property
    def score(self) -> float:
        """exp(-nats), in [0, 1]: 1 where the plan predicts what the full model predicts. NaN if a logit is NaN."""
        return math.exp(-self.nats)


def diverge(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    answers: Sequence[Sequence[int]],
    plans: Sequence[LayerPlan],
) -> list[dict[LayerPlan, Divergence]]:
    """For each of B prompts, how far each plan lies from the full model along the full model's answer (token ids)."""
    found = []
    for rows in fitting(model, list(zip(prompts, answers, strict=True))):
        found += in_halves(rows, lambda part: _diverge(model, tokenizer, part, plans))
    return found


def _diverge(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Forced],
    plans: Sequence[LayerPlan],
) -> list[dict[LayerPlan, Divergence]]:
    prompts, answers = zip(*rows, strict=True)
    forced = ForcedAnswers(model, tokenizer, prompts, answers)
    full = LayerPlan.full(plans[0].n_layers)
    order = [full, *reversed(sharing_order(model, [plan for plan in plans if plan != full]))]
    shared = SharedPasses(model, order)
    with shared.next_plan():
        expected = [logits.float().log_softmax(-1) for logits in forced.logits()]
    found: list[dict[LayerPlan, Divergence]] = [{} for _ in rows]
    for plan in order[1:]:
        before = shared.layers_run
        with shared.next_plan():
            logits = forced.logits()
        share = (shared.layers_run - before + full.n_layers / len(plans)) / full.n_layers
        for row, own in enumerate(logits):
            nats = mean_divergence(expected[row], own)
            followed = compared(answers[row], own.argmax(-1).tolist(), share * forced.tokens[row])
            found[row][plan] = Divergence(nats, tuple(followed.repeated(answers[row])), followed.forward_tokens)
    return found


def mean_divergence(expected: torch.Tensor, logits: torch.Tensor) -> float:
    """Mean of KL(expected || softmax(logits)) in nats over T tokens; log-probabilities [T, V] against logits [T, V]."""
    own = logits.float().log_softmax(-1)
    return float((expected.exp() * (expected - own)).sum(-1).mean().clamp(min=0))  # rounding may go below 0
