"""Teacher forcing: what would a model say at each token of an answer that is known already? One pass tells."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from backbone.positions import position_inputs


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
        prompt_ids: list[list[int]] = [tokenizer(text).input_ids for text in prompts]
        ids = [[*prompt, *answer[:-1]] for prompt, answer in zip(prompt_ids, answers, strict=True)]
        self.tokens = [len(row) for row in ids]
        """Tokens of each row that are passed through the network."""
        batch = tokenizer.pad({"input_ids": ids}, return_tensors="pt", padding_side="left").to(model.device)
        mask = batch["attention_mask"]
        self._inputs = {"input_ids": batch["input_ids"], "attention_mask": mask, **position_inputs(model, mask)}

    @cached_property
    def _options(self) -> dict[str, Any]:
        """Where the model allows it, the head runs for the answers' tokens only."""
        keeps = "logits_to_keep" in inspect.signature(self._model.forward).parameters
        return {"use_cache": False, **({"logits_to_keep": max(self.counts)} if keeps else {})}

    @torch.inference_mode()
    def logits(self) -> list[torch.Tensor]:
        """For each row the logits [A, vocabulary] from which its A answer tokens are predicted."""
        logits = self._model(**self._inputs, **self._options).logits
        return [row[-count:] for row, count in zip(logits, self.counts, strict=True)]
