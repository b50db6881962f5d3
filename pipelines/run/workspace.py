"""The folder of a run, with its prompts and its model: what the stages read and write."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as parquet
from numpy.typing import NDArray

from backbone.files import write_atomically
from backbone.healing.healing import Healing
from backbone.plan import LayerPlan, PlanMenu
from controller.features import Features, rows_of
from oracle.labels.labeller import Labeller
from oracle.labels.reader import LabelReader
from oracle.labels.store import LabelStore, StoreError
from oracle.prompts import Prompt, Split
from pipelines.config import Config, ConfigError
from pipelines.evaluation.learning_table import Table
from pipelines.run.model import Loaded, RunModel
from pipelines.run.prompts import IN_FULL, RunPrompts

Mask = NDArray[np.bool_]


class Workspace:
    """One run.

    Args:
        loaded: the model that `model.source` names and its tokenizer, where they are loaded already.

    Attributes:
        config: of the run.
        model: that it is for.
        prompts: that it learns from.
    """

    def __init__(self, config: Config, loaded: Loaded | None = None) -> None:
        self.config, self.model = config, RunModel(config, config.folder / "model.json", loaded)
        self.prompts = RunPrompts(config, self.model)

    def path(self, name: str) -> Path:
        return self.config.folder / name

    def read(self, name: str) -> Any:
        """The value of a JSON file in the folder."""
        return json.loads(self.path(name).read_text(encoding="utf-8"))

    def write(self, name: str, value: object, indent: int | None = 2) -> Path:
        """Write a value as a JSON file into the folder."""
        write_atomically(self.path(name), json.dumps(value, indent=indent) + "\n")
        return self.path(name)

    def frozen_menu(self) -> PlanMenu:
        """The menu as the stage `menu` made it; of the method `heads` the plans that the stage `adapt` tries."""
        return PlanMenu.load(self.path("menu.json"))

    def menu(self) -> PlanMenu:
        """The plans that the stage `adapt` kept, with budgets that count the bridges too."""
        return self.frozen_menu().keeping(self.read("adapt.json")["added_budget"])

    @cached_property
    def healing(self) -> Healing:
        """What the stage `adapt` made."""
        return Healing.load(self.path("healing.safetensors"))

    def labeller(self, healing: Healing | None) -> Labeller:
        """Labels answers of the model, under shortened plans with this healing."""
        loaded, store, label = self.model.loaded, LabelStore(self.path("labels.db")), self.config.label
        return Labeller(*loaded, self.model.decoding, store, label.batch_size, healing, verify=label.verify)

    @cached_property
    def labels(self) -> LabelReader:
        """The labels of the adapted model that are there, read without it."""
        store, key = LabelStore(self.path("labels.db"), read_only=True), self.model.facts.label_key
        return LabelReader(store, self.model.decoding, key(self.read("adapt.json")["digest"]))

    def labels_digest(self) -> str | None:
        """Of the labels that the stage `label` makes; None while any is missing, or nothing can be read."""
        needed = ("model.json", "adapt.json", "menu.json", "labels.db")
        if not all(self.path(name).is_file() for name in needed):
            return None
        try:
            return self.labels.digest(self.prompts.labelled(*IN_FULL), self.menu())
        except StoreError:
            return None  # the stage that follows says why

    def table(self, *splits: Split, wanted: Mask | None = None) -> Table:
        """The prompts of some splits with their features and labels, less those whose full answer the judge failed on.

        Args:
            splits: their names.
            wanted: the labels that are read [N, K]; None for all.

        Raises:
            ConfigError: too few of them are left.
        """
        prompts, menu = self.prompts.labelled(*splits), self.menu()
        if len(prompts) < 2:
            raise ConfigError(f"only {len(prompts)} labelled prompts are in {' and '.join(splits)}: raise label.limit")
        read = np.ones((len(prompts), len(menu)), dtype=np.bool_) if wanted is None else wanted
        scores = np.zeros(read.shape)
        for own, column, (plan, some) in zip(read.T, scores.T, by_plan(prompts, menu.plans, read).items(), strict=True):
            column[own] = self.labels.scores(some, plan)
        risk, tolerance = self.config.calibration.risk, self.config.label.tolerance
        table = Table.of(prompts, scores, self.features(*splits), np.array(menu.budgets), risk, tolerance, wanted)
        if len(table.prompts) < 2:
            raise ConfigError(
                f"the judges failed on the full model's answers to all but {len(table.prompts)} prompts of "
                f"{' and '.join(splits)}; mend the judge and delete labels.db, or use another judge"
            )
        return table

    def features(self, *splits: Split) -> Features:
        """Features of all prompts of some splits, whatever the judges say.

        Raises:
            ConfigError: they were made with another model.
        """
        rows, features = self._features
        return rows_of(features, np.array([rows[prompt.id] for prompt in self.prompts.labelled(*splits)]))

    @cached_property
    def _features(self) -> tuple[dict[str, int], Features]:
        """Row of each prompt's id, and all features."""
        path, fingerprint = self.path("features.parquet"), self.model.facts.fingerprint
        table = parquet.read_table(path)
        if (made_with := (table.schema.metadata or {}).get(b"model", b"").decode()) != fingerprint:
            raise ConfigError(
                f"{path} was made with the model {made_with or 'unknown'}, this run's is {fingerprint}; "
                "make it again with `layerbudget features`"
            )
        features = {name: np.stack(table[name].to_numpy()) for name in table.column_names if name not in ("id", "task")}
        return {name: row for row, name in enumerate(table["id"].to_pylist())}, features


def by_plan(prompts: Sequence[Prompt], plans: Sequence[LayerPlan], cells: Mask) -> Mapping[LayerPlan, Sequence[Prompt]]:
    """The prompts that are to be labelled under each plan, from a mask [N, K]."""
    return {
        plan: [prompts[row] for row in np.flatnonzero(own).tolist()] for plan, own in zip(plans, cells.T, strict=True)
    }
