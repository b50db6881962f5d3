"""What a run will take, before it takes it: prompts, tokens, disk, and minutes a stage from a measured minute."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from backbone.plan import LayerPlan, PlanMenu
from controller.features import Features
from oracle.chat import tokens_of
from oracle.labels.labeller import Labeller
from oracle.labels.reader import LabelReader, model_key
from oracle.labels.store import LabelStore, StoreError
from oracle.menus import LOOK_AT_NO_PROMPTS, build_menu
from oracle.prompts import SPLITS, Prompt
from oracle.spread import spread
from pipelines.check import check_run
from pipelines.config import Config
from pipelines.controls import CONTROLS
from pipelines.outlook import Outlook, SplitSize, StageCost
from pipelines.progress import waiting
from pipelines.rehearsal import (
    FEW,
    MANY,
    LabelCost,
    bridge_seconds,
    label_cost,
    made_up_work,
    menu_seconds,
    timing_seconds,
    training_seconds,
    trial_seconds,
)
from pipelines.run_state import RunState
from pipelines.settings_regret import cross_fits_of
from pipelines.stage_list import STAGES
from pipelines.stages.features import features_of
from pipelines.stages.menu import menu_task
from pipelines.workspace import IN_FULL, Workspace

KNOWN = ("model.json", "menu.json", "adapt.json", "stand_ins.safetensors")
"""Results of a run that begun stages are measured with."""
LITTLE = 5.0
"""Seconds that are taken for a stage whose work is small and is not measured."""


def outlook(config: Config) -> Outlook | None:
    """Measures and estimates; None where every stage is done. Writes nothing into the run's folder.

    Raises:
        ConfigError, PromptError, LoadError: as the run itself would.
    """
    Workspace.forget()
    state = RunState(config)
    Workspace.of(config).check_given()
    done = {stage.name for stage in STAGES if state.is_done(stage)}
    if len(done) == len(STAGES):
        return None
    check_run(config)
    with tempfile.TemporaryDirectory() as folder:
        scratch = config.model_copy(update={"runs": Path(folder)})
        _copy_known(config, scratch, done)
        found = _Rehearsal(config, Workspace.of(scratch), done)
        try:
            return found.outlook()
        finally:
            Workspace.forget()


def _copy_known(config: Config, scratch: Config, done: set[str]) -> None:
    scratch.folder.mkdir(parents=True)
    names = {"model.json"} | ({"menu.json"} if "menu" in done else set()) | (set(KNOWN) if "adapt" in done else set())
    for name in names:
        if (config.folder / name).is_file():
            shutil.copyfile(config.folder / name, scratch.folder / name)


@dataclass
class _Rehearsal:
    """The measurements, each made when it is first needed.

    Attributes:
        config: of the run, whose labels are looked up.
        scratch: the same run in a temporary folder, which may be written to.
        done: names of the stages that are done.
    """

    config: Config
    scratch: Workspace
    done: set[str]
    probe_seconds: float = 0.0
    """Of one prompt's features; known with `features`."""

    def outlook(self) -> Outlook:
        model_and_tokenizer = self.scratch.backbone
        start = time.perf_counter()
        with waiting(f"measuring on {len(self.few)} of {len(self.scratch.prompts)} prompts"):
            stages = [StageCost(stage.name, *self._cost(stage.name)) for stage in STAGES]
        tokenizer = model_and_tokenizer[1]
        return Outlook(
            splits=[
                SplitSize(
                    name,
                    len(self.scratch.splits[name]),
                    len(self.scratch.labelled_splits[name]),
                    sum(len(tokens_of(tokenizer, prompt.prompt)) for prompt in self.scratch.splits[name]),
                )
                for name in SPLITS
            ],
            plans=len(self.menu),
            answer_tokens=round(sum(self.missing) * self.label.answer_tokens),
            disk_bytes=self._disk_bytes(),
            stages=stages,
            measured_seconds=time.perf_counter() - start,
        )

    def _cost(self, name: str) -> tuple[str, float]:
        if name in self.done:
            return "done", 0.0
        cost: tuple[str, float] = getattr(self, f"_{name}")()
        return cost

    @cached_property
    def menu(self) -> PlanMenu:
        """The run's menu; while a search has still to find it, as many plans that skip layers evenly."""
        if "adapt" in self.done:
            return self.scratch.menu()
        if "menu" in self.done:
            return self.scratch.frozen_menu()
        method = self.config.menu.method
        return build_menu(method if method in LOOK_AT_NO_PROMPTS else "evenly", menu_task(self.scratch))

    @cached_property
    def few(self) -> list[Prompt]:
        return spread(self.scratch.labelled, 1 + FEW + min(MANY, self.config.label.batch_size))

    @cached_property
    def label(self) -> LabelCost:
        """Measured with the stand-ins that the run has so far."""
        path = self.scratch.path("rehearsal.db")
        loaded = self.scratch.adapted if "adapt" in self.done else self.scratch.backbone
        settings = self.config.label
        labeller = Labeller(
            *loaded, self.scratch.decoding, LabelStore(path), settings.batch_size, shortcut=settings.shortcut
        )
        return label_cost(labeller, self.few, self.menu, path)

    @cached_property
    def features(self) -> Features:
        features_of(self.scratch, self.few[:1])  # the warm-up
        start = time.perf_counter()
        found = features_of(self.scratch, self.few)
        self.probe_seconds = (time.perf_counter() - start) / len(self.few)
        return found

    @cached_property
    def missing(self) -> tuple[int, int]:
        """Labels of prompts to learn from that are not there: under the full plan, and under the others."""
        full, others = self.menu.plans[-1], self.menu.plans[:-1]
        labelled = self.scratch.labelled_of(*IN_FULL)
        return self._missing(labelled, [full]), self._missing(labelled, others)

    def _missing(self, prompts: Sequence[Prompt], plans: Sequence[LayerPlan]) -> int:
        """Labels that the run's own store lacks; those of plans whose stand-ins are not made cannot be there."""
        path, facts = self.config.folder / "labels.db", self.scratch.facts
        digest = str(self.scratch.adapt_record["digest"]) if "adapt" in self.done else None

        def key(plan: LayerPlan) -> str:
            return model_key(facts.fingerprint, facts.dtype, "" if plan.is_full else str(digest))

        known = [plan for plan in plans if plan.is_full or digest is not None]
        count = len(prompts) * len(plans)
        if not path.is_file():
            return count
        try:
            reader = LabelReader(LabelStore(path, read_only=True), self.scratch.decoding, key)
            there = sum(len(prompts) - len(reader.missing(prompts, plan)) for plan in known)
        except StoreError:
            return count
        return count - there

    def _menu(self) -> tuple[str, float]:
        task, method = menu_task(self.scratch), self.config.menu.method
        what = f"{len(self.menu)} plans by {method}"
        if method not in LOOK_AT_NO_PROMPTS:
            what += f" on {len(task.prompts)} prompts"
        return what, menu_seconds(method, task)

    def _adapt(self) -> tuple[str, float]:
        settings = self.config.adapt
        if settings.method in ("none", "given"):
            return "nothing" if settings.given is None else settings.given, 0.0
        prompts = self.scratch.splits["adapt"]
        count = min(settings.prompts, len(prompts))
        answers = min(count, self._missing(prompts, self.menu.plans[-1:]))
        (model, tokenizer), answer = self.scratch.backbone, round(self.label.answer_tokens)
        sequences = [(ids := tokens_of(tokenizer, prompt.prompt)) + ids[:1] * answer for prompt in self.few]
        bridges = 0.0 if settings.method == "adapter" else bridge_seconds(model, sequences, self.menu, settings, count)
        trained = {"adapter": 1, "both": 1, "best": 2, "auto": 1}.get(settings.method, 0)
        seconds = answers * self.label.full + bridges
        if settings.minutes is not None:
            seconds += trained * settings.minutes * 60
        elif trained:
            seconds += count * trained * settings.epochs * training_seconds(model, sequences, self.menu, settings)
        return f"{settings.method} from {count} prompts, {answers} of them to be answered", seconds

    def _label(self) -> tuple[str, float]:
        full, shortened = self.missing
        cost, others = self.label, max(1, len(self.menu) - 1)
        return f"{full + shortened:,} labels", full * cost.full + shortened / others * cost.shortened

    def _features(self) -> tuple[str, float]:
        prompts, _ = len(self.scratch.labelled), self.features
        return f"{prompts:,} prompts", self.probe_seconds * prompts

    @cached_property
    def _trials(self) -> dict[str, float]:
        """Seconds of a trial of each controller."""
        splits, tuning = self.scratch.labelled_splits, self.config.tuning
        work = made_up_work(self.features, len(splits["train"]) + len(splits["tune"]), self.menu, tuning)
        return {name: trial_seconds(work, name) for name in tuning.controllers}

    def _tune(self) -> tuple[str, float]:
        tuning = self.config.tuning
        splits = self.scratch.labelled_splits
        prompts = len(splits["train"]) + len(splits["tune"])
        counts = {name: cross_fits_of(tuning, name, prompts) for name in tuning.controllers}
        seconds = sum(counts[name] * cost for name, cost in self._trials.items()) / tuning.workers
        return f"{sum(counts.values())} trials of {', '.join(counts)}", seconds

    def _train(self) -> tuple[str, float]:
        folds = max(1, self.config.tuning.folds - 1)
        return f"{len(self._trials)} controllers", sum(self._trials.values()) / folds

    def _calibrate(self) -> tuple[str, float]:
        prompts, *others = self.scratch.labelled_splits["calibrate"], *self.menu.plans[:-1]
        full, shortened = self._missing(prompts, self.menu.plans[-1:]), self._missing(prompts, others)
        cost = full * self.label.full + shortened / max(1, len(others)) * self.label.shortened
        return f"{full + shortened:,} labels at most, about half of them needed", LITTLE + cost / 2

    def _evaluate(self) -> tuple[str, float]:
        settings, test = self.config.evaluation, self.scratch.labelled_splits["test"]
        frozen = len(test) if settings.frozen and self.config.adapt.method != "none" else 0
        anew = frozen + min(settings.own_judges, len(test))
        anew += min(settings.template_prompts, len(test)) if settings.template else 0
        trials = len(CONTROLS) * settings.control_trials
        labels = anew * (self.label.full + self.label.shortened)
        texts = [prompt.prompt for prompt in spread(test, settings.speed_prompts)]
        timing = timing_seconds(*self.scratch.backbone, texts, self.menu, settings)
        seconds = labels + trials * max(self._trials.values()) + timing
        return f"{anew * len(self.menu):,} labels, {trials} trials, timings of {len(texts)} prompts", seconds

    def _report(self) -> tuple[str, float]:
        return "one page (not measured)", LITTLE

    def _disk_bytes(self) -> float:
        """Labels, features, and full bridges at four bytes a number."""
        prompts, plans = len(self.scratch.labelled), len(self.menu)
        features = sum(values.nbytes for values in self.features.values()) / len(self.few) * prompts
        width = self.scratch.backbone[0].config.get_text_config().hidden_size
        gaps = {(plan.gaps[0].start, plan.gaps[0].stop) for plan in self.menu.plans[:-1] if plan.gaps}
        bridges = 0 if self.config.adapt.method == "none" else 4 * width**2 * len(gaps)
        return prompts * plans * self.label.stored_bytes + features + bridges
