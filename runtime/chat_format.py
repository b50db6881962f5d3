"""What an allocator knows of the chat template of its prompts, and what it says of prompts without it."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from backbone.errors import InputError
from backbone.strict_json import parse
from oracle.chat import ChatError, ChatTemplate, Message, tokens_of

logger = logging.getLogger(__name__)

HEAD_TOKENS, TAIL_TOKENS = 4, 8
"""Tokens, at most, that prompts are told by at their beginning and end."""
_ASKS_THE_DATE = "strftime_now"
"""In the text of templates that write the day's date near their beginning."""

_CONTENTS = ("a", "7 b", "(c)", "Zürich", "\nd", "**e**")
"""What users may say: the tokens at the edges must not depend on it."""

_warned: set[str] = set()
"""Templates that a warning was given about in this process."""


_WITHOUT = (
    "prompt %d does not begin with the tokens %s and end with %s, as all do that this allocator was made with, so that "
    "its certificate does not cover it: put it into the chat template, by allocator.rendered(prompt) or by "
    "tokenizer.apply_chat_template(messages, add_generation_prompt=True), and add no special tokens afterwards"
)


class ChatFormatError(InputError):
    """A file that is no chat format of this version, or a damaged one."""


@dataclass(frozen=True)
class ChatFormat:
    """A chat template with the tokens that tell whether it was used.

    Attributes:
        head: tokens that every prompt begins with; empty where they are not known or were not common to all prompts.
        tail: the same at the end, where the assistant's answer begins.
    """

    template: ChatTemplate
    head: tuple[int, ...] = ()
    tail: tuple[int, ...] = ()

    @classmethod
    def of(cls, template: ChatTemplate, tokenizer: PreTrainedTokenizerBase, *, for_all: bool = True) -> ChatFormat:
        """Of a template and the tokenizer of the model that it is for.

        Args:
            for_all: all prompts are rendered, so that one that is not is unlike them.
        """
        if not for_all:
            return cls(template)
        rows = [tokens_of(tokenizer, template.render(turns)) for turns in _conversations(template)]
        head = [] if _ASKS_THE_DATE in template.text else _common(rows)[:HEAD_TOKENS]
        tail = _common([row[::-1] for row in rows])[:TAIL_TOKENS]
        return cls(template, tuple(head), tuple(tail[::-1]))

    def warn_without(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> None:
        """Log, once a process, that a prompt of [B, S] has not the tokens that the template begins or ends with."""
        if self.template.hash in _warned:
            return
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        unlike = (~self.fits(input_ids, mask)).nonzero()
        if len(unlike):
            _warned.add(self.template.hash)
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
        data = {
            "template": self.template.text,
            "tokens": dict(self.template.tokens),
            "head": list(self.head),
            "tail": list(self.tail),
        }
        path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> ChatFormat:
        """Raises ChatFormatError for a file that `save` did not write."""
        try:
            data = parse(path.read_text(encoding="utf-8"))
            text, tokens, head, tail = (data.pop(name) for name in ("template", "tokens", "head", "tail"))
            known = {str: [text, *tokens.keys(), *tokens.values()], int: [*head, *tail]}
            if data or not all(type(value) is kind for kind, values in known.items() for value in values):
                raise ValueError("an entry of another kind")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ChatFormatError(f"{path} is not a chat format that this version can read ({error})") from None
        return cls(ChatTemplate(text, tokens), tuple(head), tuple(tail))


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
    common = []
    for column in zip(*rows, strict=False):
        if len({*column}) > 1:
            break
        common.append(column[0])
    return common
