"""The model of a run: what is known of it without loading it, and the loaded one."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from backbone.families import model_fingerprint
from backbone.files import write_atomically
from backbone.loading import load_backbone, load_tokenizer
from backbone.plan import LayerPlan
from oracle.chat import NO_TEMPLATE, ChatTemplate, named_tokens
from oracle.decoding import Decoding, own_settings
from oracle.labels.reader import model_key
from pipelines.config import Config, ConfigError
from pipelines.run.progress import waiting

Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]


class ModelFacts(BaseModel):
    """What `model.json` in a run folder holds.

    Attributes:
        fingerprint: of the weights.
        dtype: that it computes in, as torch writes it.
        ends, options: see `oracle.decoding.own_settings`.
        chat_template: the tokenizer's own; empty where it has none.
        tokens: the special tokens that templates may name.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    fingerprint: str
    dtype: str
    ends: list[int] = []
    options: dict[str, Any] = {}
    chat_template: str = ""
    tokens: dict[str, str] = {}

    @classmethod
    def of(cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> ModelFacts:
        ends, options = own_settings(model, tokenizer)
        template = ChatTemplate.of_tokenizer(tokenizer)
        return cls(
            fingerprint=model_fingerprint(model),
            dtype=str(model.dtype),
            ends=ends,
            options=json.loads(json.dumps(options, default=str)),
            chat_template=template.text if template else "",
            tokens=named_tokens(tokenizer),
        )

    @classmethod
    def load(cls, path: Path) -> ModelFacts:
        """Raises ConfigError for a file that `save` did not write."""
        try:
            return cls.model_validate_json(path.read_bytes())
        except ValidationError as error:
            problem = error.errors()[0]
            reason = f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}".removeprefix(": ")
            raise ConfigError(f"{path} is damaged ({reason}); delete it, and it is made again") from None

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, self.model_dump_json(indent=2) + "\n")

    def label_key(self, healing: str) -> Callable[[LayerPlan], str]:
        """Under which model the labels of a plan are kept, with healing parts of this digest."""
        return lambda plan: model_key(self.fingerprint, self.dtype, "" if plan.is_full else healing)

    @property
    def own_template(self) -> ChatTemplate | None:
        return ChatTemplate(self.chat_template, self.tokens) if self.chat_template else None

    @property
    def identity(self) -> dict[str, object]:
        """What must stay the same in a run folder, by its name in messages; a setting may change the dtype."""
        template = ChatTemplate(self.chat_template, self.tokens).hash if self.chat_template else NO_TEMPLATE
        return {
            "model": self.fingerprint,
            "generation config": (self.ends, self.options),
            "chat template": template,
            "special tokens": self.tokens,
        }


class RunModel:
    """The model that a configuration names, loaded when first needed.

    Args:
        config: of the run.
        path: of the file that holds what is known of the model, `model.json`.
        given: the model and its tokenizer, where they are loaded already; its fingerprint is checked as ever.
    """

    def __init__(self, config: Config, path: Path, given: Loaded | None = None) -> None:
        self._config, self._path, self._given = config, path, given

    @cached_property
    def facts(self) -> ModelFacts:
        """What is known of the model; loads it only in a run that never did."""
        if not self.is_known:
            _ = self.loaded
        return ModelFacts.load(self._path)

    @property
    def is_known(self) -> bool:
        return self._path.exists()

    @cached_property
    def loaded(self) -> Loaded:
        """The model and its tokenizer."""
        model = self._config.model
        if (loaded := self._given) is None:
            with waiting(f"loading {model.source} (weights in GGUF form are converted once, which takes a minute)"):
                loaded = load_backbone(model.source, dtype=model.dtype, device=model.device)
        self._keep_facts(ModelFacts.of(*loaded))
        return loaded

    def _keep_facts(self, found: ModelFacts) -> None:
        """Save what was found. Raises ConfigError where the run began with another model or other settings of it."""
        known = ModelFacts.load(self._path) if self.is_known else None
        if known is not None:
            for what, was in known.identity.items():
                if (now := found.identity[what]) != was:
                    raise ConfigError(
                        f"{self._config.folder} was made with the {what} {was}, but that of "
                        f"{self._config.model.source} is now {now}; give this run a name of its own, for example "
                        f"--set name={self._config.name}-2"
                    )
        if known != found:
            found.save(self._path)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's, without loading the model."""
        is_loaded = "loaded" in self.__dict__ or self._given is not None
        return self.loaded[1] if is_loaded else load_tokenizer(self._config.model.source)

    @property
    def decoding(self) -> Decoding:
        """How answers are generated, with what the model's generation config says."""
        return self._config.decoding.settings().completed(self.facts.ends, self.facts.options)
