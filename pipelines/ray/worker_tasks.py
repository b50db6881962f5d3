"""What a worker of `pipelines.ray.distributed` does to a piece of work: labels, features, sums for bridges."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from backbone.execution.shared_prefixes import beginnings
from backbone.healing.attaching import Healing, attach
from backbone.healing.fit_bridges import Batch, BatchSums, Sums
from backbone.left_padding import padded_inputs
from backbone.loading import load_backbone
from backbone.plan import LayerPlan
from controller.features import Features, extract, rows_of
from oracle.chat import tokens_of
from oracle.decoding import Decoding
from oracle.labels.labeller import Labeller
from oracle.labels.store import Label, LabelStore
from oracle.prompts import Prompt
from pipelines.config import ConfigError
from pipelines.config.sections import ModelSection
from pipelines.run.model_record import ModelFacts


@dataclass(frozen=True)
class ModelTask:
    """What needs the run's model: loaded with the first piece, and kept.

    Attributes:
        model: where the worker finds it.
        facts: what the run knows of it; the worker's must be the same.
        healing: attached to it.
    """

    model: ModelSection
    facts: ModelFacts
    healing: Healing | None

    @cached_property
    def backbone(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Raises ConfigError where a worker finds other weights, another dtype or another generation config."""
        loaded = load_backbone(self.model.source, dtype=self.model.dtype, device=self.model.device)
        if (found := ModelFacts.of(*loaded)) != self.facts:
            raise ConfigError(
                f"a worker finds another model at {self.model.source} than this run has: {found}, not {self.facts}"
            )
        if self.healing is not None:
            attach(loaded[0], self.healing)
        return loaded


@dataclass(frozen=True, slots=True)
class LabelPiece:
    """Labels of one block of prompts that are missing.

    Attributes:
        wanted: the prompts that have no label under a plan.
        known: the full plan's labels that are there, of prompts that are wanted under other plans.
    """

    wanted: Mapping[LayerPlan, Sequence[Prompt]]
    known: Sequence[Label]


@dataclass(frozen=True, slots=True)
class Labelled:
    """What a worker made of a `LabelPiece`; `failures` as in `Labeller`."""

    labels: list[Label]
    failures: list[str]


@dataclass(frozen=True)
class LabelTask(ModelTask):
    """Labels by the labeller of one machine, in a store of the worker's own that lasts as long as the piece."""

    decoding: Decoding
    batch_size: int
    shortcut: bool

    def __call__(self, piece: LabelPiece) -> Labelled:
        full = LayerPlan.full(next(iter(piece.wanted)).n_layers)
        with tempfile.TemporaryDirectory() as folder:
            store = LabelStore(Path(folder) / "labels.db")
            store.add(piece.known)
            labeller = Labeller(*self.backbone, self.decoding, store, self.batch_size, shortcut=self.shortcut)
            labeller.label_some(piece.wanted, full)
            labels = [
                label for plan, prompts in piece.wanted.items() for label in labeller.labels(plan, prompts).values()
            ]
        return Labelled(labels, labeller.failures)


@dataclass(frozen=True)
class FeaturesTask(ModelTask):
    """Features of a batch of prompts."""

    probe_depth: int
    sets: Sequence[str]

    def __call__(self, batch: Sequence[str]) -> Features:
        model, tokenizer = self.backbone
        return features_of_batch(model, tokenizer, batch, self.probe_depth, self.sets)


def features_of_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    probe_depth: int,
    sets: Sequence[str],
) -> dict[str, np.ndarray]:
    """Some sets of features of prompts, those that begin alike together."""
    rows = [tokens_of(tokenizer, text) for text in texts]
    found: list[Features] = []
    order: list[int] = []
    for numbers, beginning in beginnings(model, rows, probe_depth, range(probe_depth + 1)):
        some = [rows[number] for number in numbers]
        states, inputs = beginning.states(some, probe_depth, range(probe_depth + 1)), padded_inputs(model, some)
        found.append(extract(model, list(states.values()), inputs["input_ids"], inputs["attention_mask"], sets))
        order += numbers
    joined = {name: np.concatenate([features[name] for features in found]) for name in sets}
    return rows_of(joined, np.argsort(order))


@dataclass(frozen=True)
class SumsTask(ModelTask):
    """Sums over a batch of sequences, from which bridges are fitted."""

    summing: BatchSums

    def __call__(self, batch: Batch) -> Sums:
        model, _ = self.backbone
        sums = self.summing.nothing(model)
        self.summing.add(model, batch, sums)
        return sums
