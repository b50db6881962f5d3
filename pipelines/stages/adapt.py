"""Stage 2: healing parts that make shortened plans better, fitted and trained on the full model's own answers."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from backbone.errors import ArtefactError
from backbone.files import UNFINISHED, replacing
from backbone.healing.distillation import CHECKPOINT, History, distil
from backbone.healing.fit_bridges import Over, bridges_of, bridging_rounds, fit_bridges
from backbone.healing.healing import Bridges, Healing
from backbone.healing.training_targets import Example
from backbone.plan import LayerPlan
from oracle.answered_prompts import answered_examples, reference_examples
from oracle.batches import spread
from oracle.chat import padded_prompts
from oracle.frontier.frontier import static_points, upper_hull
from oracle.judges import KL
from oracle.labels.exit_answers import exit_depth
from oracle.labels.labeller import Labeller
from oracle.labels.reader import judged, score_matrix
from oracle.prompts import Prompt
from pipelines.config.sections import AdaptMethod
from pipelines.evaluation.speed import FEWEST_ROUNDS, generation_under
from pipelines.ray.distributed import Workers
from pipelines.ray.remote_work import RemoteLabeller, SumsTask, given_to_workers, remote_labeller
from pipelines.run.progress import console, duration, progress
from pipelines.run.state import check_own, stage_key
from pipelines.run.workspace import Workspace
from pipelines.stages.exit_heads import make_heads
from runtime.paired_timing import median_seconds

LOOKED_AT, SHORT = 32, 8.0
"""Prompts whose full answers tell whether exit heads suit a workload, and their mean length in tokens, at most."""
HELD = 5
"""Every so many-th prompt is held out where methods are compared."""


def run(workspace: Workspace, workers: Workers | None = None) -> Path:
    """Writes `healing.safetensors`, and `adapt.json` with how they were made and what they add to the budgets."""
    check_own(workspace.path("adapt"), lambda file: file.name == CHECKPOINT or file.name.endswith(UNFINISHED))
    model, _ = workspace.model.loaded
    made = _HealingMaker(workspace, workers)
    candidates = {method: made.healing(method) for method in made.methods}
    curves = made.compared(candidates) if len(candidates) > 1 else {}
    chosen = max(curves, key=lambda method: curves[method]["area"]) if curves else made.methods[0]
    healing = candidates[chosen]
    with replacing(workspace.path("healing.safetensors")) as unfinished:
        healing.save(unfinished)
    record = {
        "method": chosen,
        "fitted_prompts": 0 if chosen in ("none", "given") else len({prompt.id for prompt in made.prompts}),
        "digest": "" if healing.is_empty else healing.digest,
        "added_budget": {str(plan): healing.cost(model, plan) for plan in made.plans},
        "compared": curves,
        **made.record,
    }
    workspace.write("adapt.json", record)
    shutil.rmtree(workspace.path("adapt"), ignore_errors=True)
    return workspace.path("healing.safetensors")


class _HealingMaker:
    """Makes healing parts by each method; what methods share is made once.

    Attributes:
        plans: that they are for.
        record: how they were made, for `adapt.json`.
    """

    def __init__(self, workspace: Workspace, workers: Workers | None) -> None:
        self._workspace, self._settings, self._workers = workspace, workspace.config.adapt, workers
        self._menu = workspace.frozen_menu()
        self.plans: Sequence[LayerPlan] = self._menu.plans[:-1]
        self._model, self._tokenizer = workspace.model.loaded
        self._fingerprint = workspace.model.facts.fingerprint
        self.record: dict[str, Any] = {}

    @cached_property
    def methods(self) -> list[AdaptMethod]:
        """The methods to make healing parts by; of several the best one is kept."""
        method = self._settings.method
        if method == "best":
            return ["none", "bridges", "adapter", "both"]
        if method != "auto":
            return [method]
        return ["heads"] if self._are_short_exits() else ["bridges", "adapter"]

    def _are_short_exits(self) -> bool:
        """Whether every plan is an early exit, and the full model's answers have a few tokens."""
        if any(exit_depth(plan) is None for plan in self.plans):
            return False
        few = self._answers_to(spread(self._workspace.prompts.splits["adapt"], LOOKED_AT))
        return float(np.mean([example.answer for example in few])) <= SHORT

    @cached_property
    def prompts(self) -> list[Prompt]:
        """What healing parts are fitted and trained on."""
        fitted = parts(self._workspace, len(self.methods) > 1)[0]
        return spread(fitted, self._settings.most_prompts(self.methods[0]))

    def healing(self, method: AdaptMethod) -> Healing:
        """The healing parts that a method makes."""
        if method == "given":
            return self._given()
        if method == "heads":
            return Healing(self._fingerprint, self._heads())
        if method in ("none", "bridges"):
            return Healing(self._fingerprint, self._bridges if method == "bridges" else {})
        examples = self._answered
        if self._settings.references:
            examples = examples + reference_examples(self._tokenizer, self.prompts, self._workspace.model.decoding)
        with progress(f"training ({method})", 1) as advance:
            healing, history = distil(
                self._model,
                examples,
                self.plans,
                {} if method == "adapter" else self._bridges,
                self._menu.probe_depth,
                self._settings.settings(),
                self._workspace.path("adapt") / stage_key(self._workspace, "adapt") / method,
                self._fingerprint,
                _showing(advance),
            )
        if not history.ended.startswith("all"):
            console.print(f"  training {history.ended}")
        self.record[f"training_{method}"] = asdict(history)
        return healing

    def _heads(self) -> Bridges:
        """Exit heads, on the model's own distribution or on references too, whichever says more references.

        Of the menu `heads` those plans stay with which an oracle spends least.
        """
        right = [p for p in self.prompts if p.reference and p.judge not in ("agreement", KL)]
        examples = reference_examples(self._tokenizer, right, self._workspace.model.decoding)
        others = [prompt for prompt in self.prompts if prompt not in right]
        examples += self._answers_to(others) if others else []
        tasks = [prompt.task for prompt in (*right, *others)]
        targets = self._settings.targets if right else "own"
        asked = self._workspace.config.menu
        count = asked.plans if asked.method == "heads" else None
        fits, self.record["heads"] = make_heads(self._model, examples, tasks, self._menu, targets, count)
        self.plans = list(fits)
        return {plan: {len(plan.attention): fit.head} for plan, fit in fits.items()}

    def _given(self) -> Healing:
        """Those of a file, which must be this model's and know the menu's gaps."""
        found = Healing.load(Path(str(self._settings.given)))
        if found.fingerprint != self._fingerprint:
            raise ArtefactError(
                f"adapt.given, {self._settings.given}, holds healing of {found.fingerprint}, and this run's model is "
                f"{self._fingerprint}"
            )
        without = [plan for plan in self.plans if (plan.gaps or plan.healed) and plan not in found.bridges]
        if found.bridges and without:
            raise ArtefactError(
                f"adapt.given, {self._settings.given}, has no bridges for the plan {without[0]}; it has them for "
                f"{', '.join(map(str, found.bridges))}: name these in menu.given"
            )
        return found

    @cached_property
    def _bridges(self) -> Bridges:
        """Closed-form ones."""
        sequences = [example.tokens[:-1] for example in self._answered]
        start, settings = time.perf_counter(), self._settings
        steps = bridging_rounds(self.plans, settings.in_order) * len(sequences)
        with progress("sequences for bridges", steps) as advance:
            fits = fit_bridges(
                self._model,
                sequences,
                self.plans,
                form=settings.form,
                rank=settings.rank,
                in_order=settings.in_order,
                advance=advance,
                over=self._over(),
            )
        rows = [
            {
                "plan": str(plan),
                "first_layer": first,
                "form": fit.form,
                "rank": fit.bridge.rank,
                "ridge": fit.ridge,
                "error": fit.error,
                "skipping_error": fit.skipping_error,
                "tokens": fit.tokens,
            }
            for plan, of_plan in fits.items()
            for first, fit in of_plan.items()
        ]
        self.record["bridges"] = {"fits": rows, "seconds": time.perf_counter() - start}
        if settings.form not in {row["form"] for row in rows}:
            tokens = rows[0]["tokens"]
            console.print(f"  {tokens} tokens are too few for full bridges of this model: they have a low rank")
        return bridges_of(fits)

    def _over(self) -> Over | None:
        if (workers := self._workers) is None:
            return None
        given = given_to_workers(self._workspace)
        return lambda summing, batches: workers.map(SumsTask(*given, summing), batches)

    @cached_property
    def _answered(self) -> list[Example]:
        """All prompts with the full model's answers."""
        return self._answers_to(self.prompts)

    def _answers_to(self, prompts: list[Prompt]) -> list[Example]:
        """Prompts with the full model's answers, which are labels that the stage `label` finds done."""
        labeller, full = self._labeller(None), LayerPlan.full(self._menu.n_layers)
        with progress("answers of the full model", len(labeller.missing(prompts, full))) as advance:
            return answered_examples(labeller, self._tokenizer, prompts, full, advance)

    def _labeller(self, healing: Healing | None) -> Labeller | RemoteLabeller:
        """Of the model with healing parts or without, in this process or elsewhere."""
        if self._workers is not None:
            return remote_labeller(self._workspace, self._workers, healing)
        return self._workspace.labeller(healing)

    def compared(self, candidates: dict[AdaptMethod, Healing]) -> dict[AdaptMethod, dict[str, Any]]:
        """For each method its static plans on held-out prompts: time a token, mean score, area under their hull.

        The area is between the fastest plan of all methods and the full model's time, over milliseconds a token: mean
        quality at a time that one is ready to spend.
        """
        menu, prompts = self._menu, parts(self._workspace, True)[1]
        texts = [prompt.prompt for prompt in prompts[:4]]
        batch = dict(padded_prompts(self._tokenizer, texts).to(self._model.device))
        n_tokens = self._workspace.config.evaluation.speed_tokens
        scores, times = {}, {}
        for method, healing in candidates.items():
            labeller = self._labeller(healing)
            missing = sum(len(labeller.missing(prompts, plan)) for plan in menu.plans)
            with progress(f"answers with {method}", missing) as advance:
                labeller.label(prompts, menu, advance)
            scores[method] = score_matrix(labeller.read(prompts, menu))
            work = {plan: generation_under(self._model, batch, plan, n_tokens, healing) for plan in menu.plans}
            seconds = median_seconds(work, FEWEST_ROUNDS, lambda: None)
            times[method] = np.array([seconds[plan] * 1000 / n_tokens for plan in menu.plans])
        return _areas(scores, times)


def parts(workspace: Workspace, compares: bool) -> tuple[list[Prompt], list[Prompt]]:
    """The split `adapt` in prompts to fit on and prompts to compare methods on; none of the latter without a choice.

    No controller learns from them: what was fitted or picked on a prompt loses less there than elsewhere.
    """
    prompts = workspace.prompts.splits["adapt"]
    if not compares:
        return prompts, []
    return [prompt for i, prompt in enumerate(prompts) if i % HELD], prompts[::HELD]


def _showing(advance: Callable[[int], None]) -> Callable[[History], None]:
    def show(history: History) -> None:
        step, seconds = history.steps[-1], history.seconds[-1]
        now = ", ".join(f"{loss:.2f} ({plan})" for plan, loss in history.held[-1].items())
        rate = ""
        if step:  # plan-tokens count each plan that a token passes
            left = duration(seconds / step * (history.planned - step))
            rate = f"; {history.tokens / seconds:.0f} plan-tokens/s, {left} left"
        console.print(f"  step {step} of {history.planned}: KL on held prompts {now}{rate}")
        advance(1 if history.ended else 0)

    return show


def _areas(
    scores: dict[AdaptMethod, np.ndarray], times: dict[AdaptMethod, np.ndarray]
) -> dict[AdaptMethod, dict[str, Any]]:
    fastest, slowest = min(t.min() for t in times.values()), min(t[-1] for t in times.values())
    grid = np.linspace(fastest, slowest, 101)
    found: dict[AdaptMethod, dict[str, Any]] = {}
    for method, matrix in scores.items():
        _, known = judged(matrix)
        hull = upper_hull(static_points(known, times[method]))
        spent, quality = (np.array(values) for values in zip(*hull, strict=True))
        found[method] = {
            "ms_per_token": times[method].tolist(),
            "quality": known.mean(axis=0).tolist(),
            "area": float(np.interp(grid, spent, quality, left=0.0).mean()),
        }
    return found
