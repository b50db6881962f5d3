"""Requests of the OpenAI routes: body for the engine, tokens for the allocator.

A body is refused unless the engine can be sent exactly what the allocator read.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NoReturn, Self, TypeVar

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from backbone.errors import InputError
from runtime.parts import AllocatorParts
from serving.router.errors import RefusedError
from serving.router.limits import MOST_COMMAS, MOST_LEVELS, PLACE_BYTES

KEY = "layer_plan"
"""As `layerbudget-vllm` reads it, inside `XARGS`."""

XARGS = "vllm_xargs"

Body = Mapping[str, Any]
Record = Callable[[Sequence[Any]], None]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class RequestBody:
    """A body for the engine, held as JSON to save memory.

    Attributes:
        rest: all but the engine's extra arguments.
        xargs: these.
    """

    rest: bytes
    xargs: dict[str, Any] | None

    @classmethod
    def of(cls, body: Body) -> RequestBody:
        return cls(encoded({name: value for name, value in body.items() if name != XARGS}), body.get(XARGS))

    def with_plan(self, plan: str | None) -> bytes:
        """The JSON for an engine, with the plan for one that runs plans."""
        xargs = self.xargs if plan is None else {**(self.xargs or {}), KEY: plan}
        if xargs is None:
            return self.rest
        more = encoded({XARGS: xargs})
        return more if self.rest == b"{}" else self.rest[:-1] + b"," + more[1:]


def parsed(content: bytes) -> tuple[dict[str, Any], RequestBody]:
    """Parse a JSON object; raises RefusedError for one that cannot be passed on unchanged."""
    if (commas := content.count(b",")) > MOST_COMMAS:
        raise RefusedError(413, f"the body has {commas} commas; one with more than {MOST_COMMAS} is not parsed")
    try:
        body = json.loads(content.decode(), parse_constant=_refuse_number)
    except UnicodeDecodeError:
        raise _bad("the body is not UTF-8") from None
    except RecursionError:
        raise _too_deep() from None
    except ValueError as error:
        raise _bad(f"the body is no JSON ({error!s:.80})") from None
    if not isinstance(body, dict):
        raise _bad(f"the body is {content[:40]!r}")
    _check_levels(body)
    try:
        checked = RequestBody.of(body)
        encoded({XARGS: checked.xargs})
    except UnicodeEncodeError:
        raise _bad("the body contains an unpaired surrogate, which is no character") from None
    except ValueError:
        _refuse_number("a number beyond 1.8e308")
    xargs = body.get(XARGS)
    if not isinstance(xargs, dict | None):
        raise _bad(f"{XARGS} should be an object, got {xargs!r:.40}")
    if xargs and KEY in xargs:
        raise _bad(f"{XARGS}.{KEY} is chosen by the router; leave it out, or ask the engine itself")
    return body, checked


def encoded(value: Body) -> bytes:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def forwarded_headers(given: Mapping[str, str]) -> dict[str, str]:
    """Headers that go on to the engine. Raises RefusedError for one that is not ASCII."""
    own = {name: given[name] for name in ("authorization", "x-request-id") if name in given}
    if wrong := [name for name, value in own.items() if not value.isascii()]:
        raise RefusedError(400, f"the header {wrong[0]} should be ASCII, got {own[wrong[0]]!a:.40}")
    return own


def _check_levels(body: Any) -> None:
    level = [body]
    for _ in range(MOST_LEVELS):
        inner = chain.from_iterable(value.values() if type(value) is dict else value for value in level)
        level = [one for one in inner if (type(one) is list or type(one) is dict) and one]
        if not level:
            return
    raise _too_deep()


def _too_deep() -> RefusedError:
    return _bad(f"the body is nested more than {MOST_LEVELS} levels deep")


def _refuse_number(text: str) -> NoReturn:
    raise _bad(f"the body holds {text}, for which JSON has no number")


def _bad(wrong: str) -> RefusedError:
    return RefusedError(400, f"{wrong}; a request is a JSON object")


CHARACTERS_A_TOKEN = 16
"""A text with more characters for each token counts as too long, and is never tokenized."""

_RENDERED_OTHERWISE = ("tools", "chat_template", "documents", "chat_template_kwargs", "continue_final_message")
"""Fields with which the engine renders a conversation otherwise than the allocator."""


class UnreadablePromptError(InputError):
    """A request whose prompt the allocator cannot judge."""


class LongPromptError(InputError):
    """A prompt with too many tokens."""


@dataclass(frozen=True, slots=True)
class PromptReader:
    """Reads the prompts of requests, in any thread.

    Attributes:
        allocator: has the chat template.
        tokenizer: of the model.
        vocabulary: tokens that the model has.
        most_recorded: tokens of a prompt that leave room for an answer as long as the certificate's.
        record: is given the prompts that were read, as clients sent them, but for longer ones; None for nothing.
    """

    allocator: AllocatorParts
    tokenizer: PreTrainedTokenizerBase
    vocabulary: int
    most_recorded: int
    record: Record | None
    _tokenizing: threading.Lock = field(default_factory=threading.Lock)  # a fast tokenizer fails in two threads

    @classmethod
    def of(
        cls,
        allocator: AllocatorParts,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        record: Record | None = None,
    ) -> Self:
        embedded = next(model.get_input_embeddings().parameters()).shape[0]
        most_recorded = positions_of(model) - allocator.decoding.max_new_tokens
        return cls(allocator, tokenizer, min(embedded, len(tokenizer)), most_recorded, record)

    def prompts_of(self, body: Body, *, chat: bool, most_tokens: int) -> list[list[int]]:
        """The tokens of each prompt of a request, as the engine will see them.

        Args:
            body: of the request.
            chat: `messages` are put into the allocator's chat template; else `prompt` is continued as it is.
            most_tokens: of one prompt. A text that is too long by its characters alone is not tokenized.

        Raises:
            UnreadablePromptError: no prompt that can be read, or one that the engine renders otherwise.
            ChatError: turns without a template, or that it cannot render.
            LongPromptError: more tokens than `most_tokens`.
        """
        given = [_conversation(body)] if chat else _prompts(body.get("prompt"))
        if any(least_tokens(one, most_tokens) > most_tokens for one in given):
            raise LongPromptError(f"a prompt has more than {most_tokens} tokens")
        prompts = [self._tokens(one, raw=not chat) for one in given]
        if any(not prompt or min(prompt) < 0 or max(prompt) >= self.vocabulary for prompt in prompts):
            raise UnreadablePromptError(f"a prompt has one token or more, each from 0 to {self.vocabulary - 1}")
        if (longest := max(map(len, prompts))) > most_tokens:
            raise LongPromptError(f"a prompt has {longest} tokens, more than {most_tokens}")
        if self.record is not None:
            self.record([one for one, own in zip(given, prompts, strict=True) if len(own) <= self.most_recorded])
        return prompts

    def _tokens(self, prompt: Any, *, raw: bool) -> list[int]:
        if _is_tokens(prompt):
            return list(prompt)
        with self._tokenizing:
            inputs = self.allocator.inputs(self.tokenizer, [prompt], raw=raw)
        return inputs["input_ids"][0].tolist()  # type: ignore[no-any-return]


def _conversation(body: Body) -> list[Any]:
    if changed := [name for name in _RENDERED_OTHERWISE if body.get(name)]:
        raise UnreadablePromptError(f"{changed[0]} changes how the engine renders the conversation")
    if not isinstance(turns := body.get("messages"), list) or not turns:
        raise UnreadablePromptError(f"messages should be a list of turns, got {turns!r:.80}")
    return turns


def _prompts(given: Any) -> list[str | list[int]]:
    prompts = [given] if isinstance(given, str) or _is_tokens(given) else given
    if not isinstance(prompts, list) or not all((isinstance(one, str) and one) or _is_tokens(one) for one in prompts):
        prompts = []
    if not prompts:
        raise UnreadablePromptError(f"prompt should be a text, tokens, or a list of these, got {given!r:.80}")
    return prompts


def positions_of(model: PreTrainedModel) -> int:
    """Tokens that the model takes, prompt and answer; 2**31 where its configuration names no limit."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**31


PAUSES = 9
"""Times as long as a large body took, its thread rests before the next one: parsing stops all else in the process."""


class BodyThreads:
    """Threads that parse and tokenize bodies: the event loop waits for none, small bodies for no large one."""

    def __init__(self) -> None:
        self._small, self._large = (ThreadPoolExecutor(1, f"layerbudget-{size}-bodies") for size in ("small", "large"))
        self._rested = 0.0  # when the next large body may be parsed

    async def read(self, content: list[bytes], of: Callable[[dict[str, Any], RequestBody], T]) -> T:
        """What `of` makes of the parsed body; `content` is empty afterwards, so that the body is held once."""
        is_large = sum(map(len, content)) > PLACE_BYTES

        def read() -> T:
            if is_large:
                time.sleep(max(0.0, self._rested - time.perf_counter()))
            start, whole = time.perf_counter(), b"".join(content)
            content.clear()
            try:
                return of(*parsed(whole))
            finally:
                if is_large:
                    end = time.perf_counter()
                    self._rested = end + PAUSES * (end - start)

        return await asyncio.get_running_loop().run_in_executor(self._large if is_large else self._small, read)

    def close(self) -> None:
        for thread in (self._small, self._large):
            thread.shutdown(wait=False, cancel_futures=True)


def least_tokens(value: Any, most: int) -> int:
    """Lower bound on the tokens of a prompt or conversation, counted to just above `most`."""
    if isinstance(value, str):
        return -(-len(value) // CHARACTERS_A_TOKEN)
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return len(value) if len(value) > most else sum(least_tokens(one, most) for one in value)
    return 1


def _is_tokens(prompt: Any) -> bool:
    return isinstance(prompt, list) and bool(prompt) and all(type(token) is int for token in prompt)
