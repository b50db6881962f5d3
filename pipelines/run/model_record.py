"""What a run has to know of its model to read labels, tables and allocators without loading it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from backbone.files import write_atomically
from backbone.fingerprint import model_fingerprint
from oracle.chat import NO_TEMPLATE, ChatTemplate, named_tokens
from oracle.decoding import own_settings
from pipelines.config import ConfigError


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What `model.json` in a run folder holds.

    Attributes:
        fingerprint: of the weights.
        dtype: that it computes in, as torch writes it.
        ends, options: see `oracle.decoding.own_settings`.
        chat_template: the tokenizer's own; empty where it has none.
        tokens: the special tokens that templates may name.
    """

    fingerprint: str
    dtype: str
    ends: list[int] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    chat_template: str = ""
    tokens: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> ModelFacts:
        ends, options = own_settings(model, tokenizer)
        template = ChatTemplate.of_tokenizer(tokenizer)
        return cls(
            model_fingerprint(model),
            str(model.dtype),
            ends,
            json.loads(json.dumps(options, default=str)),
            template.text if template else "",
            named_tokens(tokenizer),
        )

    @property
    def own_template(self) -> ChatTemplate | None:
        """The tokenizer's own chat template, if it has one."""
        return ChatTemplate(self.chat_template, self.tokens) if self.chat_template else None

    @classmethod
    def load(cls, path: Path) -> ModelFacts:
        """Raises ConfigError for a file that `save` did not write."""
        try:
            facts = cls(**json.loads(path.read_text(encoding="utf-8")))
            if not isinstance(facts.fingerprint, str) or not isinstance(facts.dtype, str):
                raise TypeError("fingerprint and dtype must be texts")
            if not all(type(end) is int for end in facts.ends) or not isinstance(facts.options, dict):
                raise TypeError("ends must be token ids, options a dictionary")
            texts = [facts.chat_template, *facts.tokens.keys(), *facts.tokens.values()]
            if not all(isinstance(text, str) for text in texts):
                raise TypeError("chat_template must be a text, tokens texts by name")
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise ConfigError(f"{path} is damaged ({error}); delete it, and it is made again") from None
        return facts

    def save(self, path: Path) -> None:
        write_atomically(path, json.dumps(asdict(self), indent=2) + "\n")

    def difference(self, other: ModelFacts) -> str:
        """What makes two identities differ, in words."""
        if self.fingerprint != other.fingerprint:
            return "model"
        is_config = (self.ends, self.options) != (other.ends, other.options)
        return "generation config" if is_config else "chat template"

    def described(self, what: str) -> object:
        """The part that `difference` names."""
        template = ChatTemplate(self.chat_template, self.tokens)
        parts: dict[str, object] = {"model": self.fingerprint, "generation config": (self.ends, self.options)}
        return parts.get(what, template.hash if self.chat_template else NO_TEMPLATE)

    @property
    def identity(self) -> tuple[object, ...]:
        """What must stay the same in a run folder: all but the dtype, which a setting may change."""
        return self.fingerprint, self.ends, self.options, self.chat_template, self.tokens
