"""Prompts must leave room for their answers in the model's context."""

from __future__ import annotations

from collections.abc import Iterable

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from oracle.chat import tokens_of
from oracle.prompts import PromptError


def check_lengths(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Iterable[tuple[str, str]], new_tokens: int
) -> None:
    """Raises PromptError for the first prompt (id, text) that has no tokens, or too many for the model to answer.

    A model whose configuration names no `max_position_embeddings` takes any length.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for name, text in prompts:
        count = len(tokens_of(tokenizer, text))
        if not count:
            raise PromptError(f"the prompt {name!r:.80} has no tokens: there is nothing to continue")
        if limit is not None and count + new_tokens > limit:
            raise PromptError(
                f"the prompt {name!r:.80} has {count} tokens, which with {new_tokens} new ones is more than the "
                f"{limit} (max_position_embeddings) that this model takes; shorten it, or ask for fewer new tokens"
            )
