"""The distillation loss: from the full model's distributions along its answers, or from the tokens of a reference.

Plans that run over one batch share the layers that they have in common, those of the probe without gradient.

Shapes: `A` answer tokens of a batch, `V` vocabulary, `v` sampled vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from backbone.execution.live_changes import replaced
from backbone.execution.output_head import head_on
from backbone.execution.shared_passes import SharedPasses, sharing_order
from backbone.healing.trained_parts import Trainable
from backbone.left_padding import last_logits, padded_inputs
from backbone.plan import LayerPlan


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt with an answer.

    Attributes:
        tokens: ids of prompt and answer.
        answer: how many of them, at the end, are the answer.
        from_reference: the answer's tokens are the target themselves; otherwise the full model's distributions are.
    """

    tokens: tuple[int, ...]
    answer: int
    from_reference: bool = False


class DistillationLoss:
    """The loss of plans on a batch.

    Args:
        trainable: what `model` runs shortened plans with.
        vocabulary: tokens, beside the likely ones, that a step's distributions range over, drawn anew at each step.
        seed: of the draw.
    """

    def __init__(self, model: PreTrainedModel, trainable: Trainable, vocabulary: int, seed: int) -> None:
        self._model, self._trainable, self._size, self._seed = model, trainable, vocabulary, seed

    def losses(self, batch: Sequence[Example], plans: Sequence[LayerPlan], step: int) -> dict[LayerPlan, torch.Tensor]:
        """For each plan the sum over the answers' tokens of KL(full || plan), or of the cross-entropy, in nats.

        Args:
            batch: examples that run together.
            plans: shortened plans.
            step: a number for the draw of the vocabulary.
        """
        inputs = padded_inputs(self._model, [example.tokens[:-1] for example in batch])
        answers = [example.answer for example in batch]
        tokens = torch.cat([torch.tensor(e.tokens[-e.answer :]) for e in batch]).to(self._model.device)
        fixed = torch.cat([torch.full((e.answer,), e.from_reference) for e in batch]).to(self._model.device)
        full = LayerPlan.full(plans[0].n_layers)
        with self._trainable.healing() as healing:
            order = sharing_order(plans, healing)
            shared = SharedPasses(self._model, [full, *order], healing)
            with torch.no_grad(), self._trainable.off(), shared.next_plan():
                teacher = torch.cat(last_logits(self._model, inputs, answers))
            vocabulary = self._vocabulary(teacher, tokens, step)
            target = teacher[:, vocabulary].float().log_softmax(-1)
            place = torch.searchsorted(vocabulary, tokens)
            losses = {}
            for plan in order:
                with shared.next_plan(), head_on(self._model, vocabulary):
                    own = torch.cat(last_logits(self._model, inputs, answers)).float().log_softmax(-1)
                divergence = (target.exp() * (target - own)).sum(-1)
                surprise = -own.gather(-1, place[:, None])[:, 0]
                losses[plan] = torch.where(fixed, surprise, divergence).sum()
        return losses

    def _vocabulary(self, teacher: torch.Tensor, tokens: torch.Tensor, step: int) -> torch.Tensor:
        """[v], ascending: the tokens that the loss ranges over: the likely, those of the answers, and some drawn."""
        size = teacher.shape[-1]
        if size <= 2 * self._size:
            return torch.arange(size, device=teacher.device)
        generator = torch.Generator().manual_seed(hash((self._seed, step)) % 2**31)
        drawn = torch.randint(size, (self._size,), generator=generator).to(teacher.device)
        return torch.cat([teacher.topk(16, dim=-1).indices.flatten(), tokens, drawn]).unique()  # type: ignore[no-untyped-call, no-any-return]


def contiguous_head(model: PreTrainedModel) -> AbstractContextManager[None]:
    """A frozen head on a CPU is a hundred times slower on a slice of a tensor than on a contiguous one."""
    head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    forward = head.forward
    return replaced([(head, "forward", lambda states: forward(states.contiguous()))])
