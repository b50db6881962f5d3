"""Labels made by workers elsewhere, by the labeller of one machine, and kept by this process alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from backbone.healing.attaching import Healing
from backbone.plan import LayerPlan, PlanMenu
from oracle.batches import wanted_in_blocks
from oracle.labels.labeller import Advance, Missing
from oracle.labels.reader import LabelReader, key_of, model_key
from oracle.labels.store import LabelStore
from oracle.prompts import Prompt
from pipelines.config.sections import ModelSection
from pipelines.ray.distributed import Workers
from pipelines.ray.worker_tasks import LabelPiece, LabelTask
from pipelines.run.model_record import ModelFacts
from pipelines.run.workspace import Workspace


class DistantLabeller(LabelReader):
    """Fills a store as `Labeller` does; what a block lacks is one piece of work, and one transaction.

    So a block is there as a whole or not at all, and one that was lost is made again from the same prompts.

    Args:
        workers: who makes the labels.
        task: what they do.
        store: written by this process alone.
        key_of_model: see `LabelReader`.

    Attributes:
        failures: see `Labeller`.
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
        for _, made in self._workers.map(self._task, list(self._pieces(wanted, full_plan))):
            self._store.add(made.labels)
            self.failures += made.failures
            advance(len(made.labels))

    def _pieces(self, wanted: Missing, full: LayerPlan) -> Iterator[LabelPiece]:
        missing = {plan: {key_of(prompt) for prompt in self.missing(some, plan)} for plan, some in wanted.items()}
        for block in wanted_in_blocks(wanted, self._task.batch_size, self.decoding):
            lacking = {plan: [p for p in some if key_of(p) in missing[plan]] for plan, some in block.items()}
            lacking = {plan: some for plan, some in lacking.items() if some}
            if lacking:
                asked = {prompt for plan, some in lacking.items() if plan != full for prompt in some}
                answered = asked.difference(lacking.get(full, ()))
                yield LabelPiece(lacking, list(self.labels(full, answered).values()) if answered else [])


def distant_labeller(workspace: Workspace, workers: Workers, healing: Healing | None) -> DistantLabeller:
    """The labeller of a run whose workers attach these healing parts to the model."""
    label, facts = workspace.config.label, workspace.facts
    task = LabelTask(*given_to_workers(workspace, healing), workspace.decoding, label.batch_size, label.shortcut)
    digest = "" if healing is None or healing.is_empty else healing.digest

    def key(plan: LayerPlan) -> str:
        return model_key(facts.fingerprint, facts.dtype, "" if plan.is_full else digest)

    return DistantLabeller(workers, task, LabelStore(workspace.path("labels.db")), key)


def given_to_workers(
    workspace: Workspace, healing: Healing | None = None
) -> tuple[ModelSection, ModelFacts, Healing | None]:
    """What a `ModelTask` begins with. A folder or file is named as seen from anywhere on the machine."""
    model = workspace.config.model
    if (path := Path(model.source).expanduser()).exists():
        model = model.model_copy(update={"source": str(path.resolve())})
    return model, workspace.facts, healing
