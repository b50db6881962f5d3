"""Stage 2: healing parts that make shortened plans better, fitted and trained on the full model's own answers."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from backbone.files import UNFINISHED, replacing, write_atomically
from backbone.healing.attaching import Healing, attach, detach
from backbone.healing.bridges import Bridges
from backbone.healing.distillation import CHECKPOINT, History, distil
from backbone.healing.fit_bridges import Fits, Over, bridges_of, bridging_rounds, fit_bridges
from backbone.healing.tensors import HealingError
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
from pipelines.config import Config
from pipelines.config.sections import AdaptMethod
from pipelines.evaluation.paired_ratios import FEWEST_ROUNDS, generation_under
from pipelines.ray.distributed import Workers
from pipelines.ray.remote_labels import DistantLabeller, distant_labeller, given_to_workers
from pipelines.ray.worker_tasks import SumsTask
from pipelines.run.progress import console, duration, progress
from pipelines.run.state import check_own, stage_key
from pipelines.run.workspace import Workspace
from pipelines.stages.exit_heads import make_heads
from runtime.paired_timing import median_seconds

LOOKED_AT, SHORT = 32, 8.0
"""Prompts whose full answers tell whether exit heads suit a workload, and their mean length in tokens, at most."""
HELD = 5
"""Every so many-th prompt is held out where methods are compared."""


def run(config: Config, workers: Workers | None = None) -> Path:
    """Writes `healing.safetensors`, and `adapt.json` with how they were made and what they add to the budgets."""
    workspace = Workspace.of(config)
    check_own(workspace.path("adapt"), lambda file: file.name == CHECKPOINT or file.name.endswith(UNFINISHED))
    model, _ = workspace.backbone
    detach(model)
    made = _Making(workspace, workers)
    wanted = made.methods
    candidates = {method: made.healing(method) for method in wanted}
    curves = _compared(workspace, candidates, workers) if len(candidates) > 1 else {}
    chosen = max(curves, key=lambda method: curves[method]["area"]) if curves else wanted[0]
    healing = candidates[chosen]
    with replacing(workspace.path("healing.safetensors")) as unfinished:
        healing.save(unfinished)
    plans = workspace.frozen_menu().plans
    record = {
        "method": chosen,
        "fitted_prompts": 0 if chosen in ("none", "given") else len({prompt.id for prompt in made.prompts}),
        "digest": "" if healing.is_empty else healing.digest,
        "added_budget": {str(plan): healing.cost(model, plan) for plan in plans},
        "compared": curves,
        **made.record,
    }
    write_atomically(workspace.path("adapt.json"), json.dumps(record, indent=2) + "\n")
    shutil.rmtree(workspace.path("adapt"), ignore_errors=True)
    return workspace.path("healing.safetensors")


class _Making:
    """Makes healing parts by each method; what methods share is made once.

    Attributes:
        record: how they were made, for `adapt.json`.
    """

    def __init__(self, workspace: Workspace, workers: Workers | None) -> None:
        self._workspace, self._settings, self._workers = workspace, workspace.config.adapt, workers
        self._plans = workspace.frozen_menu().plans[:-1]
        self._examples: list[Example] = []
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
        if any(exit_depth(plan) is None for plan in self._plans):
            return False
        few = self._answers_to(spread(self._workspace.splits["adapt"], LOOKED_AT))
        return float(np.mean([example.answer for example in few])) <= SHORT

    def healing(self, method: AdaptMethod) -> Healing:
        fingerprint = self._workspace.fingerprint
        if method == "none":
            return Healing(fingerprint)
        if method == "given":
            return self._given(fingerprint)
        if method == "heads":
            return Healing(fingerprint, self._heads())
        bridges = {} if method == "adapter" else self._bridges
        if method == "bridges":
            return Healing(fingerprint, bridges)
        model, _ = self._workspace.backbone
        examples = self._answered() + (self._references() if self._settings.references else [])
        with progress(f"training ({method})", 1) as advance:
            healing, history = distil(
                model,
                examples,
                self._plans,
                bridges,
                self._workspace.frozen_menu().probe_depth,
                self._settings.settings(),
                self._workspace.path("adapt") / stage_key(self._workspace.config, "adapt") / method,
                fingerprint,
                _showing(advance),
            )
        if not history.ended.startswith("all"):
            console.print(f"  training {history.ended}")
        self.record[f"training_{method}"] = asdict(history)
        return healing

    def _heads(self) -> Bridges:
        """Exit heads, on the model's own distribution or on references too, whichever says more references."""
        model, tokenizer = self._workspace.backbone
        right = [p for p in self.prompts if p.reference and p.judge not in ("agreement", KL)]
        examples = reference_examples(tokenizer, right, self._workspace.decoding)
        others = [prompt for prompt in self.prompts if prompt not in right]
        examples += self._answers_to(others) if others else []
        tasks = [prompt.task for prompt in (*right, *others)]
        targets = self._settings.targets if right else "own"
        fits, self.record["heads"] = make_heads(model, examples, tasks, self._plans, targets)
        return {plan: {len(plan.attention): fits[plan].head} for plan in self._plans}

    def _given(self, fingerprint: str) -> Healing:
        """Those of a file, which must be this model's and know the menu's gaps."""
        found = Healing.load(Path(str(self._settings.given)))
        if found.fingerprint != fingerprint:
            raise HealingError(
                f"adapt.given, {self._settings.given}, holds healing of {found.fingerprint}, and this run's model is "
                f"{fingerprint}"
            )
        without = [plan for plan in self._plans if (plan.gaps or plan.healed) and plan not in found.bridges]
        if found.bridges and without:
            raise HealingError(
                f"adapt.given, {self._settings.given}, has no bridges for the plan {without[0]}; it has them for "
                f"{', '.join(map(str, found.bridges))}: name these in menu.given"
            )
        return found

    def _fitted(self) -> Fits:
        model, _ = self._workspace.backbone
        sequences = [example.tokens[:-1] for example in self._answered()]
        start, settings = time.perf_counter(), self._settings
        rounds = bridging_rounds(self._plans, settings.in_order)
        with progress("sequences for bridges", rounds * len(sequences)) as advance:
            fits = fit_bridges(
                model,
                sequences,
                self._plans,
                form=settings.form,
                rank=settings.rank,
                in_order=settings.in_order,
                advance=advance,
                over=self._over(),
            )
        self.record["bridges"] = _described(fits, time.perf_counter() - start)
        forms = {fit["form"] for fit in self.record["bridges"]["fits"]}
        if settings.form not in forms:
            tokens = self.record["bridges"]["fits"][0]["tokens"]
            console.print(f"  {tokens} tokens are too few for full bridges of this model: they have a low rank")
        return fits

    @cached_property
    def _bridges(self) -> Bridges:
        """Closed-form ones."""
        return bridges_of(self._fitted())

    def _over(self) -> Over | None:
        if (workers := self._workers) is None:
            return None
        given = given_to_workers(self._workspace)
        return lambda summing, batches: workers.map(SumsTask(*given, summing), batches)

    def _answered(self) -> list[Example]:
        """All prompts with the full model's answers."""
        if not self._examples:
            self._examples = self._answers_to(self.prompts)
        return self._examples

    def _answers_to(self, prompts: list[Prompt]) -> list[Example]:
        """Prompts with the full model's answers, which are labels that the stage `label` finds done."""
        _, tokenizer = self._workspace.backbone
        labeller = _labeller(self._workspace, None, self._workers)
        full = LayerPlan.full(self._workspace.frozen_menu().n_layers)
        with progress("answers of the full model", len(labeller.missing(prompts, full))) as advance:
            return answered_examples(labeller, tokenizer, prompts, full, advance)

    def _references(self) -> list[Example]:
        _, tokenizer = self._workspace.backbone
        return reference_examples(tokenizer, self.prompts, self._workspace.decoding)

    @cached_property
    def prompts(self) -> list[Prompt]:
        """What healing parts are fitted and trained on."""
        return spread(_parts(self._workspace, len(self.methods) > 1)[0], self._settings.prompts)


def _labeller(workspace: Workspace, attached: Healing | None, workers: Workers | None) -> Labeller | DistantLabeller:
    """Of the model with what is attached to it now, in this process or elsewhere."""
    if workers is None:
        return workspace.labeller_of(*workspace.backbone)
    return distant_labeller(workspace, workers, attached)


def _parts(workspace: Workspace, compares: bool) -> tuple[list[Prompt], list[Prompt]]:
    """The split `adapt` in prompts to fit on and prompts to compare methods on; none of the latter without a choice.

    Neither teach controllers: what was fitted or picked on a prompt loses less there than elsewhere.
    """
    prompts = workspace.splits["adapt"]
    if not compares:
        return prompts, []
    return [prompt for i, prompt in enumerate(prompts) if i % HELD], prompts[::HELD]


def _showing(advance: Callable[[int], None]) -> Callable[[History], None]:
    def show(history: History) -> None:
        step, held = history.steps[-1], history.held[-1]
        now = ", ".join(f"{loss:.2f} ({plan})" for plan, loss in held.items())
        console.print(f"  step {step} of {history.planned}: KL on held prompts {now}{_rate(history)}")
        advance(1 if history.ended else 0)

    return show


def _rate(history: History) -> str:
    """How fast tokens pass, each plan counted, and how long the rest takes; nothing before the first step."""
    if not (step := history.steps[-1]):
        return ""
    seconds = history.seconds[-1]
    left = duration(seconds / step * (history.planned - step))
    return f"; {history.tokens / seconds:.0f} plan-tokens/s, {left} left"


def _described(fits: Fits, seconds: float) -> dict[str, Any]:
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
    return {"fits": rows, "seconds": seconds}


def _compared(
    workspace: Workspace, candidates: dict[AdaptMethod, Healing], workers: Workers | None
) -> dict[AdaptMethod, dict[str, Any]]:
    """For each method its static plans on held-out prompts: time a token, mean score, and the area under their hull.

    The area is between the fastest plan of all methods and the full model's time, over milliseconds a token: mean
    quality at a time that one is ready to spend.
    """
    model, tokenizer = workspace.backbone
    menu, prompts = workspace.frozen_menu(), _parts(workspace, True)[1]
    batch = dict(padded_prompts(tokenizer, [prompt.prompt for prompt in prompts[:4]]).to(model.device))
    n_tokens = workspace.config.evaluation.speed_tokens
    scores, times = {}, {}
    for method, healing in candidates.items():
        attach(model, healing)
        labeller = _labeller(workspace, healing, workers)
        with progress(f"answers with {method}", sum(len(labeller.missing(prompts, p)) for p in menu.plans)) as advance:
            labeller.label(prompts, menu, advance)
        scores[method] = score_matrix(labeller.read(prompts, menu))
        work = {plan: generation_under(model, batch, plan, n_tokens) for plan in menu.plans}
        seconds = median_seconds(work, FEWEST_ROUNDS, lambda: None)
        times[method] = np.array([seconds[plan] * 1000 / n_tokens for plan in menu.plans])
        detach(model)
    return _areas(scores, times)


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
