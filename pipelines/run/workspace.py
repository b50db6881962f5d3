"""What the stages of one run share: its folder, its prompts and splits, the loaded model, the learning tables."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import astuple
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow.parquet as parquet
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from backbone.healing.attaching import Healing, attach
from backbone.loading import load_backbone, load_tokenizer
from backbone.plan import LayerPlan, PlanMenu
from controller.features import Features, rows_of
from oracle.chat import ChatTemplate, template_text
from oracle.context_lengths import check_lengths
from oracle.decoding import Decoding
from oracle.labels.labeller import Labeller
from oracle.labels.reader import LabelReader, model_key
from oracle.labels.store import LabelStore, StoreError
from oracle.prompts import SPLITS, Prompt, Split
from oracle.splits import limited_splits
from pipelines.config import Config, ConfigError
from pipelines.evaluation.learning_table import Table
from pipelines.run.given_model import given_model
from pipelines.run.model_record import ModelFacts
from pipelines.run.progress import waiting
from pipelines.run.prompts import prompts_of, splits_of
from pipelines.stages.labelling import by_plan

Mask = NDArray[np.bool_]
IN_FULL: tuple[Split, ...] = ("train", "tune", "test")
"""Splits that are labelled under every plan; `calibrate` is under those that its prices choose."""


class Workspace:
    """Everything is loaded when first asked for, and once a process."""

    _known: ClassVar[dict[str, Workspace]] = {}

    def __init__(self, config: Config) -> None:
        self.config = config

    @classmethod
    def of(cls, config: Config) -> Workspace:
        """The workspace of a configuration; the same object for an equal one."""
        return cls._known.setdefault(config.model_dump_json(), cls(config))

    @classmethod
    def forget(cls) -> None:
        """Drop what was loaded, so that a run sees files as they are now."""
        cls._known.clear()

    def path(self, name: str) -> Path:
        return self.config.folder / name

    @cached_property
    def given_prompts(self) -> list[Prompt]:
        """The prompts as they stand in their source."""
        return prompts_of(self.config)

    @cached_property
    def prompts(self) -> list[Prompt]:
        """The prompts as the model is given them; loads it only in a run that never did."""
        return self.rendered(self.given_prompts)

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

    @cached_property
    def prompts_hash(self) -> str:
        """SHA-256 of all prompts, references and judges, and of the template that they are put into."""
        given = [astuple(prompt) for prompt in self.given_prompts]
        return hashlib.sha256(json.dumps([given, self.chat_template_key]).encode()).hexdigest()

    @property
    def labelled(self) -> list[Prompt]:
        """The prompts that are labelled, in full or in part: all but the split `adapt`, or `label.limit` of these."""
        return self.labelled_of(*SPLITS[1:])

    def labelled_of(self, *splits: Split) -> list[Prompt]:
        return [prompt for split in splits for prompt in self.labelled_splits[split]]

    @cached_property
    def splits(self) -> dict[Split, list[Prompt]]:
        return splits_of(self.prompts, self.config)

    @cached_property
    def given_splits(self) -> dict[Split, list[Prompt]]:
        """The splits of the prompts as they stand in their source; needs no model.

        Raises:
            ConfigError: too few prompts for a split.
        """
        return splits_of(self.given_prompts, self.config)

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

    @cached_property
    def labelled_splits(self) -> dict[Split, list[Prompt]]:
        """What `label.limit` leaves of each split; nothing of `adapt`."""
        parts = dict(self.splits)
        del parts["adapt"]
        return {"adapt": [], **limited_splits(parts, self.config.label.limit)}

    @cached_property
    def backbone(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        model = self.config.model
        if (loaded := given_model(model.source)) is None:
            with waiting(f"loading {model.source} (weights in GGUF form are converted once, which takes a minute)"):
                loaded = load_backbone(model.source, dtype=model.dtype, device=model.device)
        self._check_same_model(ModelFacts.of(*loaded))
        named = [(prompt.id, prompt.prompt) for prompt in self.prompts]
        check_lengths(*loaded, named, self.config.decoding.max_new_tokens)
        return loaded

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's, without loading the model."""
        if "backbone" in self.__dict__ or given_model(self.config.model.source):
            return self.backbone[1]
        return load_tokenizer(self.config.model.source)

    def _check_same_model(self, found: ModelFacts) -> None:
        """A run folder keeps to the weights, and to the generation config, that it began with."""
        path = self.path("model.json")
        known = ModelFacts.load(path) if path.exists() else None
        if known is None or (known.identity == found.identity and known != found):
            path.parent.mkdir(parents=True, exist_ok=True)
            found.save(path)
        elif known.identity != found.identity:
            what = known.difference(found)
            was, now = (x.described(what) for x in (known, found))
            raise ConfigError(
                f"{self.config.folder} was made with the {what} {was}, but that of {self.config.model.source} is now "
                f"{now}; give this run a name of its own, for example --set name={self.config.name}-2"
            )

    @cached_property
    def facts(self) -> ModelFacts:
        """What is known of the model; loads it only in a run that never did."""
        if not self.path("model.json").exists():
            _ = self.backbone
        return ModelFacts.load(self.path("model.json"))

    @property
    def fingerprint(self) -> str:
        return self.facts.fingerprint

    @property
    def decoding(self) -> Decoding:
        """How answers are generated, with what the model's generation config says."""
        return self.config.decoding.settings().completed(self.facts.ends, self.facts.options)

    @cached_property
    def healing(self) -> Healing:
        """What the stage `adapt` made."""
        return Healing.load(self.path("healing.safetensors"))

    @cached_property
    def adapted(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The model with its healing parts attached."""
        model, tokenizer = self.backbone
        attach(model, self.healing)
        return model, tokenizer

    @cached_property
    def labeller(self) -> Labeller:
        """Labels answers of the adapted model."""
        return self.labeller_of(*self.adapted)

    def labeller_of(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Labeller:
        store, label = LabelStore(self.path("labels.db")), self.config.label
        return Labeller(model, tokenizer, self.decoding, store, label.batch_size, shortcut=label.shortcut)

    @cached_property
    def labels(self) -> LabelReader:
        """The labels of the adapted model that are there, read without it."""
        facts, healing = self.facts, self.adapt_record["digest"]

        def key(plan: LayerPlan) -> str:
            return model_key(facts.fingerprint, facts.dtype, "" if plan.is_full else healing)

        return LabelReader(LabelStore(self.path("labels.db"), read_only=True), self.decoding, key)

    def labels_digest(self) -> str | None:
        """Of the labels that the stage `label` makes; None while any is missing, or nothing can be read."""
        needed = ("model.json", "adapt.json", "menu.json", "labels.db")
        if not all(self.path(name).is_file() for name in needed):
            return None
        try:
            return self.labels.digest(self.labelled_of(*IN_FULL), self.menu())
        except StoreError:
            return None  # the stage that follows says why

    def frozen_menu(self) -> PlanMenu:
        """The menu as the stage `menu` made it."""
        return PlanMenu.load(self.path("menu.json"))

    def menu(self) -> PlanMenu:
        """The menu whose budgets count the bridges too."""
        return self.frozen_menu().with_added(self.adapt_record["added_budget"])

    @property
    def adapt_record(self) -> dict[str, Any]:
        """What the stage `adapt` noted."""
        record: dict[str, Any] = json.loads(self.path("adapt.json").read_text())
        return record

    def table(self, *splits: Split, wanted: Mask | None = None) -> Table:
        """The prompts of some splits with their features and labels, less those whose full answer the judge failed on.

        Args:
            wanted: the labels that are read [N, K]; None for all.

        Raises:
            ConfigError: too few of them are left.
        """
        prompts, plans = self.labelled_of(*splits), self.menu().plans
        if len(prompts) < 2:
            raise ConfigError(f"only {len(prompts)} labelled prompts are in {' and '.join(splits)}: raise label.limit")
        read = np.ones((len(prompts), len(plans)), dtype=np.bool_) if wanted is None else wanted
        scores = np.zeros(read.shape)
        for own, column, (plan, some) in zip(read.T, scores.T, by_plan(prompts, plans, read).items(), strict=True):
            column[own] = self.labels.scores(some, plan)
        table = self.table_of(prompts, scores, self.features(*splits), wanted)
        if len(table.prompts) < 2:
            raise ConfigError(
                f"the judges failed on the full model's answers to all but {len(table.prompts)} prompts of "
                f"{' and '.join(splits)}; mend the judge and delete labels.db, or use another judge"
            )
        return table

    def table_of(
        self, prompts: list[Prompt], scores: NDArray[np.float64], features: Features, labelled: Mask | None = None
    ) -> Table:
        """Prompts with their scores [N, K] and features, NaN where a judge failed; see `Table.of`."""
        risk, tolerance = self.config.calibration.risk, self.config.label.tolerance
        return Table.of(prompts, scores, features, np.array(self.menu().budgets), risk, tolerance, labelled)

    def features(self, *splits: Split) -> Features:
        """Features of all prompts of some splits, whatever the judges say.

        Raises:
            ConfigError: they were made with another model.
        """
        rows, features = self._features
        return rows_of(features, np.array([rows[prompt.id] for prompt in self.labelled_of(*splits)]))

    @cached_property
    def _features(self) -> tuple[dict[str, int], Features]:
        """Row of each prompt's id, and all features."""
        table = parquet.read_table(self.path("features.parquet"))
        if (made_with := (table.schema.metadata or {}).get(b"model", b"").decode()) != self.fingerprint:
            raise ConfigError(
                f"{self.path('features.parquet')} was made with the model {made_with or 'unknown'}, this run's is "
                f"{self.fingerprint}; make it again with `layerbudget features`"
            )
        names = [name for name in table.column_names if name not in ("id", "task")]
        features = {name: np.stack(table[name].to_numpy()) for name in names}
        return {name: row for row, name in enumerate(table["id"].to_pylist())}, features
