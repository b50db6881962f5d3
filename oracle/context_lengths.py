"""Prompts must leave room for their answers in the model's context."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from oracle.chat import tokens_of
from oracle.prompts import PromptError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def check_lengths(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Iterable[tuple[str, str]], new_tokens: int
) -> None:
    """Raises PromptError for the first prompt (id, text) that is no text, or has no tokens, or too many for the model
    to answer.

    A model whose configuration names no `max_position_embeddings` takes any length.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for name, text in prompts:
        _check_text(name, text)
        count = len(tokens_of(tokenizer, text))
        if not count:
            raise PromptError(f"the prompt {name!r:.80} has no tokens: there is nothing to continue")
        check_room(name, count, new_tokens, limit)


def check_room(name: str, count: int, new_tokens: int, limit: int | None) -> None:
    """Raises PromptError where a prompt of `count` tokens and its answer are more than the model takes."""
    if limit is not None and count + new_tokens > limit:
        raise PromptError(
            f"the prompt {name!r:.80} has {count} tokens, which with {new_tokens} new ones is more than the "
            f"{limit} (max_position_embeddings) that this model takes; shorten it, or ask for fewer new tokens"
        )


def _check_text(name: str, text: str) -> None:
    """A byte on the command line that is not UTF-8 becomes half a character, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PromptError(
            f"the prompt {name!r:.80} holds {text[error.start]!r}, which is no character; give it in UTF-8"
        ) from None
