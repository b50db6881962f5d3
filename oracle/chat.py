"""Chat templates: what a prompt asks, the text that a template makes of it, and its tokens. One rule for every stage.

A template writes a model's special tokens itself, often the one that begins a sequence too. So a rendered text is
marked as such (`Rendered`), and `tokens_of`, the only place where prompts become tokens, adds none to it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backbone.errors import InputError

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedTokenizerBase

ROLES = ("system", "user", "assistant")

NO_TEMPLATE = "none"
"""Stands for the hash of a template where there is none."""

Turns = Sequence[Mapping[str, str]]
"""A conversation as users and files give it: objects with `role` and `content`."""


class ChatError(InputError):
    """A conversation, or a chat template, that cannot be used."""


class Rendered(str):
    """A text that a chat template wrote, in which all special tokens stand already."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Question:
    """What a prompt asks: a text or a conversation; one of the two.

    Attributes:
        raw: the text is what the model is to continue, without a template.
    """

    text: str = ""
    messages: tuple[Message, ...] = ()
    raw: bool = False

    @classmethod
    def of(cls, given: str | Turns, *, raw: bool = False) -> Question:
        """Of what a script or a line of a file gives. Raises ChatError for what `of_row` refuses."""
        return cls.of_row({"prompt" if isinstance(given, str) else "messages": given, "raw": raw})

    @classmethod
    def of_row(cls, row: Mapping[str, Any]) -> Question:
        """Of an object with `prompt` or `messages`, and perhaps `raw`.

        Raises:
            ChatError: none of the two or both, an empty prompt, or turns that are no conversation to be answered.
        """
        given = [name for name in ("prompt", "messages") if row.get(name) is not None]
        raw = row.get("raw")
        if not given:
            raise ChatError("the prompt is missing; give prompt, a text, or messages, the turns of a conversation")
        if len(given) > 1:
            raise ChatError("prompt and messages are both given; leave one of them out")
        if raw is not None and not isinstance(raw, bool):
            raise ChatError(f"raw should be true or false, got {raw!r:.80}")
        if given == ["messages"]:
            if raw:
                raise ChatError("raw goes with prompt; messages need a chat template to become a text")
            return cls(messages=_conversation(row["messages"]))
        if not isinstance(row["prompt"], str):
            raise ChatError(f"the prompt should be a text, got {row['prompt']!r:.80}")
        if not row["prompt"].strip():
            raise ChatError("the prompt is empty")
        return cls(row["prompt"], raw=bool(raw))

    def to_row(self) -> dict[str, Any]:
        """For JSON; `of_row` reads it."""
        if self.messages:
            return {"messages": [asdict(message) for message in self.messages]}
        return {"prompt": self.text, **({"raw": True} if self.raw else {})}


def _conversation(given: Any) -> tuple[Message, ...]:
    if not isinstance(given, list | tuple):
        raise ChatError(f"messages should be a list of turns, got {given!r:.80}")
    if not given:
        raise ChatError("messages is empty; it should hold at least the user's turn")
    turns = tuple(_turn(number, turn) for number, turn in enumerate(given, 1))
    if turns[-1].role != "user":
        raise ChatError(
            f"the last turn is the {turns[-1].role}'s; it should be the user's, which is to be answered (a known "
            "answer goes into reference)"
        )
    return turns


def _turn(number: int, turn: Any) -> Message:
    if not isinstance(turn, Mapping) or not isinstance(turn.get("content"), str):
        raise ChatError(f"turn {number} should hold role and content, both texts, got {turn!r:.80}")
    if turn.get("role") not in ROLES:
        raise ChatError(f"turn {number} has the role {turn.get('role')!r:.80}; roles are {', '.join(ROLES)}")
    if others := [name for name in turn if name not in ("role", "content") and turn[name] is not None]:
        raise ChatError(f"turn {number} holds {others[0]!r:.80}, which is not supported; a turn has role and content")
    if turn["role"] == "user" and not turn["content"].strip():  # a model may well answer nothing
        raise ChatError(f"turn {number} is empty")
    return Message(turn["role"], turn["content"])


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja template with the special tokens that it may name.

    Attributes:
        text: the template.
        tokens: name -> text, such as `bos_token`.
    """

    text: str
    tokens: Mapping[str, str] = field(default_factory=dict)

    @property
    def hash(self) -> str:
        """A short name for all that decides what it writes."""
        return hashlib.sha256(json.dumps([self.text, dict(self.tokens)], sort_keys=True).encode()).hexdigest()[:16]

    def render(self, messages: Sequence[Message]) -> Rendered:
        """The conversation up to where the assistant's answer begins, as `tokenizer.apply_chat_template` has it.

        Raises:
            ChatError: the template cannot render it.
        """
        from transformers.utils.chat_template_utils import render_jinja_template  # slow, and prompts need none of it

        turns, variables = [asdict(message) for message in messages], dict[str, Any](self.tokens)
        try:
            texts: Any = render_jinja_template(
                conversations=[turns],
                chat_template=self.text,
                add_generation_prompt=True,
                **variables,
            )
        except Exception as error:  # a template is a program that anybody may have written
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ChatError(f"the chat template {self.hash} cannot render it: {reason:.200}") from None
        return Rendered(texts[0][0])

    @classmethod
    def of_tokenizer(cls, tokenizer: PreTrainedTokenizerBase) -> ChatTemplate | None:
        """The one that the tokenizer came with; of several the one named `default`. None if there is none."""
        if not tokenizer.chat_template:
            return None
        try:
            return cls(tokenizer.get_chat_template(), named_tokens(tokenizer))
        except ValueError as error:
            raise ChatError(f"the tokenizer's chat templates cannot be used: {error}") from None

    @classmethod
    def of_file(cls, path: Path, tokens: Mapping[str, str]) -> ChatTemplate:
        """Raises ChatError for no such file, no UTF-8, or a template that never shows what the user says."""
        template = cls(template_text(path), tokens)
        first, second = (template.render([Message("user", content)]) for content in ("one", "two"))
        if first == second:
            raise ChatError(f"the chat template {path} never shows what the user says (a message's content)")
        return template


def template_text(path: Path) -> str:
    """The text of a template's file. Raises ChatError where there is none that can be read."""
    try:
        return path.expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ChatError(f"cannot read the chat template {path} ({reason}); give auto, never, or a file") from None


def named_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """The special tokens that templates may name."""
    return {name: text for name, text in tokenizer.special_tokens_map.items() if isinstance(text, str)}


def rendered(question: Question, template: ChatTemplate | None) -> str:
    """The text that the model is given: the rule of every stage and of every allocator.

    Without a template, or marked raw, a text is given as it is; with one it is what the user says.

    Raises:
        ChatError: messages without a template, or what the template cannot render.
    """
    if question.messages and template is None:
        raise ChatError(
            "messages need a chat template, and there is none: give prompt, or a template (data.chat_template: FILE)"
        )
    if question.raw or template is None:
        return question.text
    return template.render(question.messages or (Message("user", question.text),))


def tokens_of(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of a prompt. One that begins the sequence is there as tokenizer or template have it, never twice."""
    begin = tokenizer.bos_token
    whole = isinstance(text, Rendered) or bool(begin and text.startswith(begin))
    return list(tokenizer(str(text), add_special_tokens=not whole).input_ids)


def padded_prompts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> BatchEncoding:
    """Rendered prompts as one left-padded batch: tensors `input_ids` and `attention_mask` [B, S]."""
    rows = {"input_ids": [tokens_of(tokenizer, text) for text in texts]}
    return tokenizer.pad(rows, return_tensors="pt", padding_side="left", return_attention_mask=True)
