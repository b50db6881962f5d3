"""Prompts that a model does not take, found before anything is computed."""

from __future__ import annotations

from collections.abc import Iterable

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from oracle.prompts import Prompt, PromptError


def check_lengths(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Iterable[Prompt], max_new_tokens: int
) -> None:
    """Raises PromptError for a prompt without tokens, or one that leaves no room for its answer.

    Models without `max_position_embeddings` take prompts of any length.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for prompt in prompts:
        tokens = len(tokenizer(prompt.prompt)["input_ids"])
        if tokens == 0:
            raise PromptError(f"the prompt {prompt.id!r} has no tokens: this model's tokenizer knows none of its text")
        if limit is not None and tokens + max_new_tokens > limit:
            raise PromptError(
                f"the prompt {prompt.id!r} has {tokens} tokens, which with {max_new_tokens} new ones are more than the "
                f"{limit} that the model takes; shorten it or leave it out"
            )
