"""The prompt inside a request of the OpenAI routes, as the tokens that the allocator reads."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from backbone.errors import InputError
from runtime.parts import AllocatorParts
from serving.router.requests import Body

CHARACTERS_A_TOKEN = 16
"""A text with more characters than this for each token is taken for too long, and never tokenized."""

_RENDERED_OTHERWISE = ("tools", "chat_template", "documents", "chat_template_kwargs", "continue_final_message")
"""What makes the engine render a conversation otherwise than the allocator does."""


class UnreadablePromptError(InputError):
    """A request whose prompt the allocator cannot judge: it runs the full plan."""


class LongPromptError(InputError):
    """A request with more tokens than are decided about at a time: it runs the full plan."""


@dataclass(frozen=True, slots=True)
class PromptReader:
    """Reads the prompts of requests, in any thread.

    Attributes:
        allocator: has the chat template.
        tokenizer: of the model.
        most_tokens: of one request, padded.
        vocabulary: tokens that the model has.
    """

    allocator: AllocatorParts
    tokenizer: PreTrainedTokenizerBase
    most_tokens: int
    vocabulary: int
    _tokenizing: threading.Lock = field(default_factory=threading.Lock)  # a fast tokenizer fails in two threads

    def prompts_of(self, body: Body, *, chat: bool) -> list[list[int]]:
        """The tokens of each prompt of a request, as the engine will see them.

        Args:
            body: of the request.
            chat: `messages` are put into the allocator's chat template; else `prompt` is continued as it is.

        Raises:
            UnreadablePromptError: no prompt that can be read, or one that the engine renders otherwise.
            ChatError: turns without a template, or that it cannot render.
            LongPromptError: more tokens than `most_tokens`.
        """
        if least_tokens(body.get("messages" if chat else "prompt"), self.most_tokens) > self.most_tokens:
            raise LongPromptError(f"a request of more than {self.most_tokens} tokens")
        prompts = [self._conversation(body)] if chat else self._texts(body.get("prompt"))
        if any(not prompt or min(prompt) < 0 or max(prompt) >= self.vocabulary for prompt in prompts):
            raise UnreadablePromptError(f"a prompt has one token or more, each from 0 to {self.vocabulary - 1}")
        if len(prompts) * max(map(len, prompts)) > self.most_tokens:
            raise LongPromptError(f"a request of more than {self.most_tokens} tokens, padded")
        return prompts

    def _conversation(self, body: Body) -> list[int]:
        if changed := [name for name in _RENDERED_OTHERWISE if body.get(name)]:
            raise UnreadablePromptError(f"{changed[0]} changes how the engine renders the conversation")
        if not isinstance(body.get("messages"), list):
            raise UnreadablePromptError("messages is a list of turns")
        return self._tokens(body["messages"])

    def _texts(self, prompt: Any) -> list[list[int]]:
        given = [prompt] if isinstance(prompt, str) or _is_tokens(prompt) else prompt
        if not isinstance(given, list) or not given:
            raise UnreadablePromptError("a request has messages, or a prompt: a text, tokens, or a list of these")
        return [self._one(text) for text in given]

    def _one(self, prompt: Any) -> list[int]:
        if isinstance(prompt, str) and prompt:
            return self._tokens(prompt, raw=True)
        if _is_tokens(prompt):
            return list(prompt)
        raise UnreadablePromptError(f"a prompt is a text or tokens of the model, got {prompt!r:.80}")

    def _tokens(self, prompt: Any, *, raw: bool = False) -> list[int]:
        with self._tokenizing:
            inputs = self.allocator.inputs(self.tokenizer, [prompt], raw=raw)
        return inputs["input_ids"][0].tolist()  # type: ignore[no-any-return]


def least_tokens(value: Any, most: int) -> int:
    """The fewest tokens that a prompt, or a conversation, can have; no more than just above `most` is counted."""
    if isinstance(value, str):
        return -(-len(value) // CHARACTERS_A_TOKEN)
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return len(value) if len(value) > most else sum(least_tokens(one, most) for one in value)
    return 1


def _is_tokens(prompt: Any) -> bool:
    return isinstance(prompt, list) and bool(prompt) and all(type(token) is int for token in prompt)
