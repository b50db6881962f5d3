"""What the stages of one run share: its folder, its prompts and splits, the loaded model, the learning tables."""

from __future__ import annotations

import hashlib
import json
from dataclasses import astuple, dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow.parquet as parquet
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from backbone.loading import load_backbone, model_fingerprint
from backbone.plan import PlanMenu
from backbone.stand_ins import StandIns, attach
from oracle.frontier import sufficient_plans
from oracle.labelling import Labeller, score_matrix
from oracle.labels import LabelStore
from oracle.prompts import SPLITS, Prompt, Split, load_prompts, split_of
from pipelines.config import Config, ConfigError
from pipelines.progress import waiting


@dataclass(frozen=True, slots=True)
class Table:
    """What there is to learn from: N prompts of one split.

    Attributes:
        prompts: the N prompts.
        features: raw features [N, F].
        scores: under each plan [N, K].
        sufficient: whether each plan is sufficient [N, K].
        budgets: of each plan [K].
    """

    prompts: list[Prompt]
    features: NDArray[np.float32]
    scores: NDArray[np.float64]
    sufficient: NDArray[np.bool_]
    budgets: NDArray[np.float64]


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
    def prompts(self) -> list[Prompt]:
        data = self.config.data
        return load_prompts(
            data.path,
            limit=data.limit,
            columns=data.columns,
            dataset_split=data.split,
            judge=data.judge,
            force_judge=data.force_judge,
        )

    @cached_property
    def prompts_hash(self) -> str:
        """SHA-256 of all prompts, references and judges."""
        return hashlib.sha256(json.dumps([astuple(prompt) for prompt in self.prompts]).encode()).hexdigest()

    @cached_property
    def splits(self) -> dict[Split, list[Prompt]]:
        parts: dict[Split, list[Prompt]] = {split: [] for split in SPLITS}
        for prompt in self.prompts:
            parts[split_of(prompt, self.config.data.shares)].append(prompt)
        if small := [split for split, prompts in parts.items() if len(prompts) < 2]:
            raise ConfigError(
                f"{len(self.prompts)} prompts leave {len(parts[small[0]])} for the split {small[0]!r}, which needs 2 "
                "or more: use more prompts or other data.shares"
            )
        return parts

    @cached_property
    def backbone(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        model = self.config.model
        with waiting(f"loading {model.source} (weights in GGUF form are converted once, which takes a minute)"):
            loaded = load_backbone(model.source, dtype=model.dtype, device=model.device)
        self._check_same_weights(loaded[0])
        return loaded

    def _check_same_weights(self, model: PreTrainedModel) -> None:
        """A run folder keeps to the weights it began with."""
        path, found = self.path("model.txt"), model_fingerprint(model)
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(found)
        elif (known := path.read_text()) != found:
            raise ConfigError(
                f"{self.config.folder} was made with the model {known}, but {self.config.model.source} is now {found}; "
                f"give this run a name of its own, for example --set name={self.config.name}-2"
            )

    @property
    def fingerprint(self) -> str:
        return self.path("model.txt").read_text()

    @cached_property
    def stand_ins(self) -> StandIns:
        """What the stage `adapt` made."""
        return StandIns.load(self.path("stand_ins.safetensors"))

    @cached_property
    def adapted(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The model with its stand-ins attached."""
        model, tokenizer = self.backbone
        attach(model, self.stand_ins)
        return model, tokenizer

    @cached_property
    def labeller(self) -> Labeller:
        """Labels answers of the adapted model."""
        return self.labeller_of(*self.adapted)

    def labeller_of(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Labeller:
        store = LabelStore(self.path("labels.db"))
        label = self.config.label
        return Labeller(
            model, tokenizer, self.config.decoding.settings(), store, label.batch_size, shortcut=label.shortcut
        )

    def frozen_menu(self) -> PlanMenu:
        """The menu as the stage `menu` made it."""
        return PlanMenu.load(self.path("menu.json"))

    def menu(self) -> PlanMenu:
        """The menu whose budgets count the bridges too."""
        return self.frozen_menu().with_added(json.loads(self.path("adapt.json").read_text())["added_budget"])

    def table(self, *splits: Split) -> Table:
        """The prompts of some splits with their features and labels, less those that a judge failed on.

        Raises:
            ConfigError: too few of them are left.
        """
        prompts = [prompt for split in splits for prompt in self.splits[split]]
        menu = self.menu()
        scores = score_matrix(self.labeller.read(prompts, menu))
        judged = ~np.any(np.isnan(scores), axis=1)
        prompts = [prompt for prompt, kept in zip(prompts, judged.tolist(), strict=True) if kept]
        scores = scores[judged]
        if len(prompts) < 2:
            raise ConfigError(f"the judges failed on all but {len(prompts)} prompts of {' and '.join(splits)}")
        rows = self._features()
        return Table(
            prompts=prompts,
            features=np.stack([rows[prompt.id] for prompt in prompts]),
            scores=scores,
            sufficient=sufficient_plans(scores, self.config.label.tolerance),
            budgets=np.array(menu.budgets),
        )

    def _features(self) -> dict[str, NDArray[np.float32]]:
        table = parquet.read_table(self.path("features.parquet"))
        matrix = np.stack(table["features"].to_numpy())
        return dict(zip(table["id"].to_pylist(), matrix, strict=True))
