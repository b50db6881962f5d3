"""The prompts of a run: as they stand in their source, as the model is given them, and in their splits."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import astuple
from functools import cached_property
from pathlib import Path

from oracle.chat import ChatTemplate, template_text
from oracle.prompts import SPLITS, Prompt, Split, limited, load_prompts, split_of
from pipelines.config import Config, ConfigError
from pipelines.model_record import ModelFacts


class RunPrompts(ABC):
    """Everything is read when first asked for. What needs no model says so."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def path(self, name: str) -> Path:
        return self.config.folder / name

    @property
    @abstractmethod
    def facts(self) -> ModelFacts:
        """What is known of the model; loads it only in a run that never did."""

    @cached_property
    def given_prompts(self) -> list[Prompt]:
        """The prompts as they stand in their source."""
        return self._loaded(self.config.data.force_judge)

    @cached_property
    def prompts(self) -> list[Prompt]:
        """The prompts as the model is given them; loads it only in a run that never did."""
        return self.rendered(self.given_prompts)

    @cached_property
    def prompts_as_judged(self) -> list[Prompt]:
        """The prompts with the judges that they came with."""
        return self.rendered(self._loaded(None))

    def rendered(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """Prompts as the model is given them. Raises PromptError for one that the chat template cannot render."""
        return [prompt.rendered(self.chat_template) for prompt in prompts]

    @cached_property
    def chat_template(self) -> ChatTemplate | None:
        """What `data.chat_template` says; None where prompts are given as they are."""
        if (wanted := self.config.data.chat_template) == "never":
            return None
        return self.facts.own_template if wanted == "auto" else ChatTemplate.of_file(Path(wanted), self.facts.tokens)

    @property
    def chat_template_key(self) -> str | None:
        """What stages are done again for: the template, as far as it is known without loading the model."""
        if (wanted := self.config.data.chat_template) == "never":
            return None
        if wanted != "auto":
            return template_text(Path(wanted))
        return self.facts.chat_template if self.path("model.json").exists() else None

    def _loaded(self, force_judge: str | None) -> list[Prompt]:
        data = self.config.data
        return load_prompts(
            data.path,
            limit=data.limit,
            columns=data.columns,
            dataset_split=data.split,
            judge=data.judge,
            force_judge=force_judge,
        )

    @cached_property
    def prompts_hash(self) -> str:
        """SHA-256 of all prompts, references and judges, and of the template that they are put into."""
        given = [astuple(prompt) for prompt in self.given_prompts]
        return hashlib.sha256(json.dumps([given, self.chat_template_key]).encode()).hexdigest()

    @cached_property
    def labelled(self) -> list[Prompt]:
        """The prompts that are labelled and learned from: all but the split `adapt`, or `label.limit` of these."""
        adapt = set(self.splits["adapt"])
        return limited([prompt for prompt in self.prompts if prompt not in adapt], self.config.label.limit)

    @cached_property
    def splits(self) -> dict[Split, list[Prompt]]:
        return self._split(self.prompts)

    @cached_property
    def given_splits(self) -> dict[Split, list[Prompt]]:
        """The splits of the prompts as they stand in their source; needs no model.

        Raises:
            ConfigError: too few prompts for a split.
        """
        return self._split(self.given_prompts)

    def check_given(self) -> None:
        """What can be known of the prompts without the model.

        Raises:
            ConfigError: too few prompts for a split.
            PromptError: prompts that cannot be read, or conversations although there is to be no template.
            ChatError: a template's file that cannot be read.
        """
        _ = self.given_splits, self.chat_template_key
        if self.config.data.chat_template == "never":
            _ = self.prompts

    def _split(self, prompts: Sequence[Prompt]) -> dict[Split, list[Prompt]]:
        parts: dict[Split, list[Prompt]] = {split: [] for split in SPLITS}
        for prompt in prompts:
            parts[split_of(prompt, self.config.data.shares)].append(prompt)
        needed = [split for split in SPLITS if split != "adapt" or self.config.makes_from_prompts]
        if small := [split for split in needed if len(parts[split]) < 2]:
            raise ConfigError(
                f"{len(prompts)} prompts leave {len(parts[small[0]])} for the split {small[0]!r}, which needs 2 "
                "or more: use more prompts or other data.shares"
            )
        return parts

    @cached_property
    def labelled_splits(self) -> dict[Split, list[Prompt]]:
        labelled = {prompt.id for prompt in self.labelled}
        return {
            split: [prompt for prompt in prompts if prompt.id in labelled] for split, prompts in self.splits.items()
        }
