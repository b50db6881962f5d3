"""What workers do to a piece of work (labels, features, sums for bridges), and the labeller that hands pieces out."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from backbone.execution.shared_prefixes import beginnings
from backbone.healing.fit_bridges import Batch, BatchSums, Sums
from backbone.healing.healing import Healing
from backbone.left_padding import padded_inputs
from backbone.loading import load_backbone
from backbone.plan import LayerPlan, PlanMenu
from controller.features import Features, extract, rows_of
from oracle.batches import wanted_in_blocks
from oracle.chat import tokens_of
from oracle.decoding import Decoding
from oracle.labels.labeller import Advance, Labeller, Missing
from oracle.labels.reader import LabelReader, key_of
from oracle.labels.store import Label, LabelStore
from oracle.prompts import Prompt
from pipelines.config import ConfigError
from pipelines.config.sections import ModelSection
from pipelines.ray.distributed import Workers
from pipelines.run.model import Loaded, ModelFacts
from pipelines.run.workspace import Workspace


@dataclass(frozen=True)
class ModelTask:
    """What needs the run's model: loaded with the first piece, and kept.

    Attributes:
        model: where the worker finds it.
        facts: what the run knows of it; the worker's must be the same.
        healing: what shortened plans run with.
    """

    model: ModelSection
    facts: ModelFacts
    healing: Healing | None

    @cached_property
    def backbone(self) -> Loaded:
        """Raises ConfigError where a worker finds other weights, another dtype or another generation config."""
        loaded = load_backbone(self.model.source, dtype=self.model.dtype, device=self.model.device)
        if (found := ModelFacts.of(*loaded)) != self.facts:
            raise ConfigError(
                f"a worker finds another model at {self.model.source} than this run has: {found}, not {self.facts}"
            )
        return loaded


def given_to_workers(
    workspace: Workspace, healing: Healing | None = None
) -> tuple[ModelSection, ModelFacts, Healing | None]:
    """What a `ModelTask` begins with. A folder or file is named as seen from anywhere on the machine."""
    model = workspace.config.model
    if (path := Path(model.source).expanduser()).exists():
        model = model.model_copy(update={"source": str(path.resolve())})
    return model, workspace.model.facts, healing


@dataclass(frozen=True)
class FeaturesTask(ModelTask):
    """Features of a batch of prompts."""

    probe_depth: int
    sets: Sequence[str]

    def __call__(self, batch: Sequence[str]) -> Features:
        return features_of_batch(*self.backbone, batch, self.probe_depth, self.sets)


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


@dataclass(frozen=True, slots=True)
class LabelPiece:
    """Labels of one block of prompts that are missing.

    Attributes:
        wanted: the prompts that have no label under a plan.
        known: the full plan's labels that are there, of prompts that are wanted under other plans.
    """

    wanted: Mapping[LayerPlan, Sequence[Prompt]]
    known: Sequence[Label]


@dataclass(frozen=True)
class LabelTask(ModelTask):
    """Labels, and what judges failed on, by the labeller of one machine in a store that lasts as long as the piece."""

    decoding: Decoding
    batch_size: int
    verify: bool

    def __call__(self, piece: LabelPiece) -> tuple[list[Label], list[str]]:
        full = LayerPlan.full(next(iter(piece.wanted)).n_layers)
        with tempfile.TemporaryDirectory() as folder:
            store = LabelStore(Path(folder) / "labels.db")
            store.add(piece.known)
            labeller = Labeller(*self.backbone, self.decoding, store, self.batch_size, self.healing, verify=self.verify)
            labeller.label_some(piece.wanted, full)
            labels = [
                label for plan, prompts in piece.wanted.items() for label in labeller.labels(plan, prompts).values()
            ]
        return labels, labeller.failures


class RemoteLabeller(LabelReader):
    """Fills a store, which this process alone writes, as `Labeller` does.

    What a block lacks is one piece of work, and one transaction. So a block is there as a whole or not at all, and one
    that was lost is made again from the same prompts.
    """

    def __init__(
        self, workers: Workers, task: LabelTask, store: LabelStore, key_of_model: Callable[[LayerPlan], str]
    ) -> None:
        super().__init__(store, task.decoding, key_of_model)
        self._workers, self._task = workers, task
        self.failures: list[str] = []

    def label(self, prompts: Sequence[Prompt], menu: PlanMenu, advance: Advance = lambda done: None) -> None:
        """Label all prompts under all plans of the menu."""
        self.label_in_blocks(dict.fromkeys(menu.plans, prompts), menu.plans[-1], advance)

    def label_full(self, prompts: Sequence[Prompt], full_plan: LayerPlan, advance: Advance = lambda done: None) -> None:
        """Label all prompts under the full plan alone."""
        self.label_in_blocks({full_plan: prompts}, full_plan, advance)

    def label_in_blocks(self, wanted: Missing, full_plan: LayerPlan, advance: Advance = lambda done: None) -> None:
        """Label some prompts under some plans."""
        for _, (labels, failures) in self._workers.map(self._task, list(self._pieces(wanted, full_plan))):
            self._store.add(labels)
            self.failures += failures
            advance(len(labels))

    def _pieces(self, wanted: Missing, full: LayerPlan) -> Iterator[LabelPiece]:
        missing = {plan: {key_of(prompt) for prompt in self.missing(some, plan)} for plan, some in wanted.items()}
        for block in wanted_in_blocks(wanted, self._task.batch_size, self.decoding):
            lacking = {plan: [p for p in some if key_of(p) in missing[plan]] for plan, some in block.items()}
            lacking = {plan: some for plan, some in lacking.items() if some}
            if lacking:
                asked = {prompt for plan, some in lacking.items() if plan != full for prompt in some}
                answered = asked.difference(lacking.get(full, ()))
                yield LabelPiece(lacking, list(self.labels(full, answered).values()) if answered else [])


def remote_labeller(workspace: Workspace, workers: Workers, healing: Healing | None) -> RemoteLabeller:
    """The labeller of a run whose workers run shortened plans with this healing."""
    label, model = workspace.config.label, workspace.model
    task = LabelTask(*given_to_workers(workspace, healing), model.decoding, label.batch_size, label.verify)
    digest = "" if healing is None or healing.is_empty else healing.digest
    return RemoteLabeller(workers, task, LabelStore(workspace.path("labels.db")), model.facts.label_key(digest))
