"""What an allocator knows of the chat template of its prompts, and what it says of prompts without it.

A template is a program, which may come from anybody. So a saved allocator holds the template's hash, never its text,
which comes from the tokenizer or from a file of the user's own.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from backbone.errors import ArtefactError
from backbone.strict_json import LONGEST_NAME, parse
from oracle.chat import ChatError, ChatTemplate, Message, template_text, tokens_of
from oracle.decoding import LARGEST_TOKEN

logger = logging.getLogger(__name__)

HEAD_TOKENS, TAIL_TOKENS, MOST_TOKENS = 4, 8, 64
"""Tokens, at most, at the beginning and end that prompts are told by; special tokens that a template may name."""
_HASH = re.compile(r"[0-9a-f]{16}")
_ASKS_THE_DATE = "strftime_now"
"""In the text of templates that write the day's date near their beginning."""

_CONTENTS = ("a", "7 b", "(c)", "Zürich", "\nd", "**e**")
"""What users may say: the tokens at the edges must not depend on it."""

_GIVE = "load the tokenizer of the allocator's model, or give the template's file (chat_template=FILE, --chat-template)"

_warned: set[str] = set()
"""Templates that a warning was given about in this process."""

_WITHOUT = (
    "prompt %d does not begin with the tokens %s and end with %s, as all do that this allocator was made with, so that "
    "its certificate does not cover it: put it into the chat template, by allocator.rendered(tokenizer, prompt) or by "
    "tokenizer.apply_chat_template(messages, add_generation_prompt=True), and add no special tokens afterwards"
)


@dataclass(frozen=True)
class ChatFormat:
    """A chat template by its hash, with the tokens that tell whether it was used.

    Attributes:
        hash: of the template and its special tokens, see `ChatTemplate.hash`.
        special: the special tokens that it may name.
        head: tokens that every prompt begins with; empty where they are not known or were not common to all prompts.
        tail: the same at the end, where the assistant's answer begins.
        text: of the template, where it is not the tokenizer's own or need not be read from there; never saved.
    """

    hash: str
    special: Mapping[str, str] = field(default_factory=dict)
    head: tuple[int, ...] = ()
    tail: tuple[int, ...] = ()
    text: str | None = field(default=None, compare=False)

    @classmethod
    def of(cls, template: ChatTemplate, tokenizer: PreTrainedTokenizerBase, *, for_all: bool = True) -> ChatFormat:
        """Of a template and the tokenizer of the model that it is for.

        Args:
            for_all: all prompts are rendered, so that one that is not is unlike them.
        """
        plain = cls(template.hash, template.tokens, text=template.text)
        if not for_all:
            return plain
        rows = [tokens_of(tokenizer, template.render(turns)) for turns in _conversations(template)]
        head = [] if _ASKS_THE_DATE in template.text else _common(rows)[:HEAD_TOKENS]
        tail = _common([row[::-1] for row in rows])[:TAIL_TOKENS]
        return replace(plain, head=tuple(head), tail=tuple(tail[::-1]))

    def template(self, tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
        """The template itself. Raises ChatError where the text at hand is another one, or there is none."""
        own = None if self.text is not None else ChatTemplate.of_tokenizer(tokenizer)
        text = self.text if own is None else own.text
        if text is None:
            raise ChatError(
                f"the tokenizer has no chat template, and this allocator's prompts are put into {self.hash}; {_GIVE}"
            )
        found = ChatTemplate(text, self.special)
        if found.hash != self.hash:
            raise ChatError(
                f"the chat template at hand is {found.hash}, this allocator's prompts are put into {self.hash}; {_GIVE}"
            )
        return found

    def of_text(self, path: Path) -> ChatFormat:
        """The same with the template in a file. Raises ChatError for another template."""
        given = replace(self, text=template_text(path))
        if (found := ChatTemplate(given.text or "", self.special).hash) != self.hash:
            raise ChatError(f"{path} is the chat template {found}, this allocator's prompts are put into {self.hash}")
        return given

    def warn_without(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> None:
        """Log, once a process, that a prompt of [B, S] has not the tokens that the template begins or ends with."""
        if self.hash in _warned:
            return
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        unlike = (~self.fits(input_ids, mask)).nonzero()
        if len(unlike):
            _warned.add(self.hash)
            logger.warning(_WITHOUT, int(unlike[0]), list(self.head), list(self.tail))

    def fits(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Whether the tokens of each prompt [B, S], left-padded, begin and end as the template makes them; bool [B]."""
        width = input_ids.shape[1]
        if width < max(len(self.head), len(self.tail)):
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        head, tail = (torch.tensor(ids, dtype=torch.long, device=input_ids.device) for ids in (self.head, self.tail))
        starts = attention_mask.long().argmax(dim=1, keepdim=True)
        columns = (starts + torch.arange(len(head), device=starts.device)).clamp(max=width - 1)
        begins = input_ids.gather(1, columns) == head
        return begins.all(dim=1) & (input_ids[:, width - len(tail) :] == tail).all(dim=1)

    def save(self, path: Path) -> None:
        data = {"hash": self.hash, "special": dict(self.special), "head": list(self.head), "tail": list(self.tail)}
        path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> ChatFormat:
        """Raises ArtefactError for a file that `save` did not write."""
        try:
            data = parse(path.read_text(encoding="utf-8"))
            name, special, head, tail = (data.pop(key) for key in ("hash", "special", "head", "tail"))
            texts, ids = [name, *special.keys(), *special.values()], [*head, *tail]
            if data or {*map(type, texts)} != {str} or not {*map(type, ids)} <= {int}:
                raise ValueError("an entry of another kind")
            if not _HASH.fullmatch(name) or len(special) > MOST_TOKENS or max(map(len, texts)) > LONGEST_NAME:
                raise ValueError("the hash should be 16 hexadecimal digits, and special tokens few and short")
            if len(head) > HEAD_TOKENS or len(tail) > TAIL_TOKENS or not all(0 <= id_ < LARGEST_TOKEN for id_ in ids):
                raise ValueError(f"head and tail should be at most {HEAD_TOKENS} and {TAIL_TOKENS} ids of tokens")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ArtefactError(f"{path} is not a chat format that this version can read ({error})") from None
        return cls(name, special, tuple(head), tuple(tail))


def _conversations(template: ChatTemplate) -> list[tuple[Message, ...]]:
    """One turn of every kind, and longer conversations as far as the template takes them."""
    user, answer, system = Message("user", "a"), Message("assistant", "b"), Message("system", "c")
    found: list[tuple[Message, ...]] = [(Message("user", content),) for content in _CONTENTS]
    for turns in ((system, user), (user, answer, user)):
        try:
            template.render(turns)
        except ChatError:
            continue
        found.append(turns)
    return found


def _common(rows: Sequence[Sequence[int]]) -> list[int]:
    """The tokens that all rows begin with."""
    columns = takewhile(lambda column: len({*column}) == 1, zip(*rows, strict=False))
    return [column[0] for column in columns]
