"""The prompts of a run: as in their source, as the model is given them, and in splits. Does not import torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import astuple
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from oracle import splits
from oracle.chat import ChatTemplate, template_text
from oracle.prompts import SPLITS, Prompt, Split, load_prompts
from pipelines.config import Config, ConfigError

if TYPE_CHECKING:
    from pipelines.run.model import RunModel

LEAST_OF_A_SPLIT = 2
IN_FULL: tuple[Split, ...] = ("train", "tune", "test")
"""Splits that are labelled under every plan; `calibrate` is under those that its prices choose."""


def prompts_of(config: Config) -> list[Prompt]:
    """Raises PromptError, see `oracle.prompts.load_prompts`."""
    data = config.data
    return load_prompts(
        data.path,
        limit=data.limit,
        columns=data.columns,
        dataset_split=data.split,
        judge=data.judge,
        force_judge=data.force_judge,
    )


def splits_of(prompts: Sequence[Prompt], config: Config) -> dict[Split, list[Prompt]]:
    """The prompts of each split. Raises ConfigError where a split that is needed has too few."""
    parts = splits.splits_of(prompts, config.data.shares, config.data.seed)
    for split, own in parts.items():
        if len(own) < LEAST_OF_A_SPLIT and (split != "adapt" or config.makes_from_prompts):
            raise ConfigError(
                f"{len(prompts)} prompts leave {len(own)} for the split {split!r}, which needs {LEAST_OF_A_SPLIT} "
                "or more: use more prompts or other data.shares"
            )
    return parts


def labelled_of(parts: dict[Split, list[Prompt]], config: Config) -> dict[Split, list[Prompt]]:
    """What `label.limit` leaves of each split; nothing of `adapt`."""
    return {"adapt": [], **splits.limited_splits({split: parts[split] for split in SPLITS[1:]}, config.label.limit)}


class RunPrompts:
    """The prompts of one run; the model is loaded for its chat template only in a run that never did."""

    def __init__(self, config: Config, model: RunModel) -> None:
        self._config, self._model = config, model

    @cached_property
    def given(self) -> list[Prompt]:
        """As they stand in their source."""
        return prompts_of(self._config)

    @cached_property
    def rendered(self) -> list[Prompt]:
        return self.render(self.given)

    def render(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """Prompts as the model is given them. Raises PromptError for one that the chat template cannot render."""
        return [prompt.rendered(self.template) for prompt in prompts]

    @cached_property
    def template(self) -> ChatTemplate | None:
        """What `data.chat_template` says; None where prompts are given as they are."""
        if (wanted := self._config.data.chat_template) == "never":
            return None
        facts = self._model.facts
        return facts.own_template if wanted == "auto" else ChatTemplate.of_file(Path(wanted), facts.tokens)

    @property
    def _template_key(self) -> str | None:
        """The template's text, as far as it is known without loading the model."""
        if (wanted := self._config.data.chat_template) == "never":
            return None
        if wanted != "auto":
            return template_text(Path(wanted))
        return self._model.facts.chat_template if self._model.is_known else None

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all prompts, references and judges, and of the template that they are put into."""
        given = [astuple(prompt) for prompt in self.given]
        return hashlib.sha256(json.dumps([given, self._template_key]).encode()).hexdigest()

    @cached_property
    def splits(self) -> dict[Split, list[Prompt]]:
        return splits_of(self.rendered, self._config)

    @cached_property
    def labelled_splits(self) -> dict[Split, list[Prompt]]:
        return labelled_of(self.splits, self._config)

    def labelled(self, *wanted: Split) -> list[Prompt]:
        """The prompts that are labelled, in full or in part, of some splits or of all."""
        return [prompt for split in wanted or SPLITS for prompt in self.labelled_splits[split]]

    def check_given(self) -> None:
        """Check what can be known of the prompts without the model.

        Raises:
            ConfigError: too few prompts for a split.
            PromptError: prompts that cannot be read, or conversations although there is to be no template.
            ChatError: a template's file that cannot be read.
        """
        _ = splits_of(self.given, self._config), self._template_key
        if self._config.data.chat_template == "never":
            _ = self.rendered
