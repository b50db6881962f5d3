"""Verification: one pass over the full model's answer tells how far a plan repeats it, and how far it diverges.

If, over the full model's answer, the plan's arg-max is the answer's next token at each of the first n places, then the
plan, decoding by itself, would have produced these n tokens and then its own next one. So a large model verifies a
draft in speculative decoding (Leviathan et al. 2023, arXiv 2211.17192, section 2). Plans that begin with the same
layers share those layers' computation.

The judge `kl` compares the distributions along the same pass. It sees a plan weaken long before its arg-max changes,
and says nothing about where the plan's own answer would have gone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from backbone.execution.shared_passes import SharedPasses, sharing_order
from backbone.healing.healing import ReadyHealing
from backbone.left_padding import in_halves, last_logits, memory_budget, padded_inputs
from backbone.plan import LayerPlan

Row = tuple[Sequence[int], Sequence[int]]
"""Token ids of a prompt, and of its known answer."""

LOGITS_BYTES = 2**28
"""Logits of one pass, at most; with a large vocabulary they outweigh everything else."""


@dataclass(frozen=True, slots=True)
class Verified:
    """One plan along one known answer.

    Attributes:
        matches: for each token of the answer, whether the plan would say it there.
        ids: what the plan, decoding by itself, says: of the answer what it repeats, then its own token if it diverges.
        forward_tokens: tokens passed through the network, each weighted by the share of the layers that it passed.
        nats: mean of KL(full || plan) over the answer's tokens; NaN where it was not asked for, or a logit is NaN.
    """

    matches: tuple[bool, ...]
    ids: tuple[int, ...]
    forward_tokens: float
    nats: float = math.nan

    @property
    def score(self) -> float:
        """exp(-nats), in [0, 1]: 1 where the plan predicts what the full model predicts."""
        return math.exp(-self.nats)


def verify(
    model: PreTrainedModel, rows: Sequence[Row], plans: Sequence[LayerPlan], healing: ReadyHealing | None = None
) -> list[dict[LayerPlan, Verified]]:
    """For each of B rows, how far each plan, with this healing, repeats the known answer."""
    order = sharing_order(plans, healing)
    return _in_parts(model, rows, lambda part: _passes(model, part, order, healing))


def diverge(
    model: PreTrainedModel, rows: Sequence[Row], plans: Sequence[LayerPlan], healing: ReadyHealing | None = None
) -> list[dict[LayerPlan, Verified]]:
    """As `verify`, with the divergence of each shortened plan from the full one, whose pass they share out."""
    full = LayerPlan.full(plans[0].n_layers)
    order = [full, *reversed(sharing_order([plan for plan in plans if plan != full], healing))]
    return _in_parts(model, rows, lambda part: _passes(model, part, order, healing, compared=len(plans)))


def _in_parts(
    model: PreTrainedModel, rows: Sequence[Row], run: Callable[[Sequence[Row]], list[dict[LayerPlan, Verified]]]
) -> list[dict[LayerPlan, Verified]]:
    """`run` on parts of the rows whose logits fit into LOGITS_BYTES, or into a sixteenth of a GPU's free memory."""
    of_row = max(len(answer) for _, answer in rows) * model.config.get_text_config().vocab_size * 4
    size = max(1, memory_budget(model.device, LOGITS_BYTES, 1 / 16) // of_row)
    parts = (rows[start : start + size] for start in range(0, len(rows), size))
    return [found for part in parts for found in in_halves(part, run)]


@torch.inference_mode()
def _passes(
    model: PreTrainedModel,
    rows: Sequence[Row],
    order: Sequence[LayerPlan],
    healing: ReadyHealing | None,
    compared: int = 0,
) -> list[dict[LayerPlan, Verified]]:
    """A pass under each plan over prompts and answers, left-padded, so that all answers end in the last column.

    With `compared` plans the first one, the full plan, is what the others are held against.
    """
    ids = [[*prompt, *answer[:-1]] for prompt, answer in rows]
    inputs, counts = padded_inputs(model, ids), [len(answer) for _, answer in rows]
    shared, expected = SharedPasses(model, order, healing), list[torch.Tensor]()
    found: list[dict[LayerPlan, Verified]] = [{} for _ in rows]
    for plan in order:
        before = shared.layers_run
        with shared.next_plan():
            logits = last_logits(model, inputs, counts)
        if compared and not expected:
            expected = [own.float().log_softmax(-1) for own in logits]
            continue
        share = (shared.layers_run - before) / plan.n_layers + (1 / compared if compared else 0)
        for number, ((_, answer), own) in enumerate(zip(rows, logits, strict=True)):
            nats = mean_divergence(expected[number], own) if compared else math.nan
            found[number][plan] = _verified(answer, own.argmax(-1).tolist(), share * len(ids[number]), nats)
    return found


def _verified(answer: Sequence[int], own: Sequence[int], forward_tokens: float, nats: float) -> Verified:
    """A known answer, and what a plan says at each of its places."""
    matches = tuple(a == b for a, b in zip(answer, own, strict=True))
    said = tuple(answer) if all(matches) else (*answer[: (n := matches.index(False))], own[n])
    return Verified(matches, said, forward_tokens, nats)


def mean_divergence(expected: torch.Tensor, logits: torch.Tensor) -> float:
    """Mean of KL(expected || softmax(logits)) in nats over T tokens; log-probabilities [T, V] against logits [T, V]."""
    own = logits.float().log_softmax(-1)
    return float((expected.exp() * (expected - own)).sum(-1).mean().clamp(min=0))  # rounding may go below 0
