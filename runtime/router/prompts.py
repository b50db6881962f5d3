"""The prompt inside a request of the OpenAI routes, as the tokens that the allocator reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from backbone.errors import InputError
from oracle.chat import tokens_of
from runtime.parts import AllocatorParts

Body = Mapping[str, Any]

_RENDERED_OTHERWISE = ("tools", "chat_template", "documents", "chat_template_kwargs", "continue_final_message")
"""What makes the engine render a conversation otherwise than the allocator does."""


class UnreadablePromptError(InputError):
    """A request whose prompt the allocator cannot judge: it runs the full plan."""


def prompts_of(body: Body, allocator: AllocatorParts, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The tokens of each prompt of a request, as the engine will see them.

    `/v1/completions` continues a text as it is; in `/v1/chat/completions` the conversation is put into the allocator's
    chat template.

    Args:
        body: of the request.
        allocator: has the chat template.
        tokenizer: of the model.

    Raises:
        UnreadablePromptError: no prompt that can be read, or one that the engine renders otherwise.
        ChatError: turns without a template, or that it cannot render.
    """
    if "messages" in body:
        if changed := [name for name in _RENDERED_OTHERWISE if body.get(name)]:
            raise UnreadablePromptError(f"{changed[0]} changes how the engine renders the conversation")
        if not isinstance(body["messages"], list):
            raise UnreadablePromptError("messages is a list of turns")
        return [tokens_of(tokenizer, allocator.rendered(tokenizer, body["messages"]))]
    prompt = body.get("prompt")
    given = [prompt] if isinstance(prompt, str) or _is_tokens(prompt) else prompt
    if not isinstance(given, list) or not given:
        raise UnreadablePromptError("a request has messages, or a prompt: a text, tokens, or a list of these")
    return [_tokens(one, allocator, tokenizer) for one in given]


def _is_tokens(prompt: Any) -> bool:
    return isinstance(prompt, list) and bool(prompt) and all(type(token) is int for token in prompt)


def _tokens(prompt: Any, allocator: AllocatorParts, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    if isinstance(prompt, str) and prompt:
        return tokens_of(tokenizer, allocator.rendered(tokenizer, prompt, raw=True))
    if _is_tokens(prompt) and min(prompt) >= 0 and max(prompt) < len(tokenizer):
        return list(prompt)
    raise UnreadablePromptError(f"a prompt is a text or tokens of the model, got {prompt!r:.80}")
