"""Teacher forcing: what would a model say at each token of an answer that is known already? One pass tells."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from backbone.left_padding import last_logits, padded_inputs
from oracle.chat import tokens_of


class ForcedAnswers:
    """Prompts with their known answers, as one left-padded batch in which all answers end in the last column.

    Args:
        prompts: B texts.
        answers: tokens of each prompt's answer, at least one.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[str],
        answers: Sequence[Sequence[int]],
    ) -> None:
        self._model = model
        self.counts = [len(answer) for answer in answers]
        prompt_ids = [tokens_of(tokenizer, text) for text in prompts]
        ids = [[*prompt, *answer[:-1]] for prompt, answer in zip(prompt_ids, answers, strict=True)]
        self.tokens = [len(row) for row in ids]
        """Tokens of each row that are passed through the network."""
        self._inputs = padded_inputs(model, ids)

    @torch.inference_mode()
    def logits(self) -> list[torch.Tensor]:
        """For each row the logits [A, vocabulary] from which its A answer tokens are predicted."""
        return last_logits(self._model, self._inputs, self.counts)
