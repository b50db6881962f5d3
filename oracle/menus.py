"""Menus: the plans that all prompts of a run choose from. Each method proposes shortened plans."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from backbone.families import decoder_layers, sublayer_bytes
from backbone.plan import LayerPlan, PlanError, PlanMenu
from backbone.running import apply_plan
from oracle.answering import answer_batch
from oracle.decoding import Decoding

Advance = Callable[[], None]
T = TypeVar("T")
Removal = tuple[set[int], set[int]]
"""Layers whose attention goes, and layers whose MLP goes."""


@dataclass(frozen=True, slots=True)
class MenuTask:
    """What a menu is made for.

    Attributes:
        model: the model, with its tokenizer.
        prompts: a few prompts of the workload, for methods that look at the model's answers.
        decoding: how answers are generated.
        probe_depth: layers that every plan runs.
        n_plans: K, the full plan included.
        cheapest_budget: share of the decoder's bytes that the cheapest plan should run.
        given: texts of the plans, for the method `given`.

    Raises:
        PlanError: a probe as deep as the model.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    prompts: Sequence[str]
    decoding: Decoding
    probe_depth: int
    n_plans: int
    cheapest_budget: float
    given: Sequence[str] = ()

    def __post_init__(self) -> None:
        if not 1 <= self.probe_depth < self.n_layers:
            raise PlanError(f"probe_depth must be from 1 to {self.n_layers - 1} for this model, got {self.probe_depth}")

    @property
    def n_layers(self) -> int:
        return len(decoder_layers(self.model))


def given(task: MenuTask, advance: Advance) -> list[LayerPlan]:
    """The plans that the user wrote down."""
    return [LayerPlan.parse(text, task.n_layers) for text in task.given]


def evenly(task: MenuTask, advance: Advance) -> list[LayerPlan]:
    """Evenly spread skips (Unified Layer Skipping, Liu et al. 2024, arXiv 2404.06954, section 3)."""
    shortest = max(task.probe_depth + 1, round(task.cheapest_budget * task.n_layers))
    counts = _spread(range(shortest, task.n_layers), task.n_plans - 1)
    return [LayerPlan.evenly(task.n_layers, count, probe_depth=task.probe_depth) for count in counts]


def exiting(task: MenuTask, advance: Advance) -> list[LayerPlan]:
    """Early exits: prefixes of the model."""
    shortest = max(task.probe_depth, round(task.cheapest_budget * task.n_layers))
    return [LayerPlan.exiting(task.n_layers, n) for n in _spread(range(shortest, task.n_layers), task.n_plans - 1)]


def greedy_layers(task: MenuTask, advance: Advance) -> list[LayerPlan]:
    """Removes, step by step, the layer whose loss changes the full model's next-token distributions least."""
    return _greedy(task, _layer_removals(task), advance)


def greedy_sublayers(task: MenuTask, advance: Advance) -> list[LayerPlan]:
    """As `greedy_layers`, but attention and MLP of a layer go one at a time."""
    return _greedy(task, _sublayer_removals(task), advance)


def _layer_removals(task: MenuTask) -> list[Removal]:
    return [({i}, {i}) for i in range(task.probe_depth, task.n_layers)]


def _sublayer_removals(task: MenuTask) -> list[Removal]:
    layers = range(task.probe_depth, task.n_layers)
    attention: list[Removal] = [({i}, set()) for i in layers]
    mlp: list[Removal] = [(set(), {i}) for i in layers]
    return attention + mlp


MENUS: dict[str, Callable[[MenuTask, Advance], list[LayerPlan]]] = {
    "given": given,
    "evenly": evenly,
    "exiting": exiting,
    "greedy_layers": greedy_layers,
    "greedy_sublayers": greedy_sublayers,
}


def search_steps(method: str, task: MenuTask) -> int:
    """About how often a search will call `advance`; 0 for methods that do not search."""
    removals = {"greedy_layers": _layer_removals, "greedy_sublayers": _sublayer_removals}.get(method)
    if removals is None:
        return 0
    n = len(removals(task))
    removed = min(n, math.ceil((1 - task.cheapest_budget) / (1 - task.probe_depth / task.n_layers) * n))
    return sum(n - i for i in range(removed))


def build_menu(method: str, task: MenuTask, advance: Advance = lambda: None) -> PlanMenu:
    """The menu of a method's plans and the full plan; `advance` is called at every step of a search.

    Raises:
        PlanError: the task asks for plans that the model cannot have.
    """
    return PlanMenu.build(MENUS[method](task, advance), sublayer_bytes(task.model), task.probe_depth)


def _greedy(task: MenuTask, removals: Sequence[Removal], advance: Advance) -> list[LayerPlan]:
    sizes = sublayer_bytes(task.model)
    divergence = AnswerDivergence(task)
    plan, left, path = LayerPlan.full(task.n_layers), list(removals), []
    while left and plan.budget(sizes) > task.cheapest_budget:
        costs = []
        for attention, mlp in left:
            costs.append(divergence.of(plan.without(attention=attention, mlp=mlp)))
            advance()
        attention, mlp = left.pop(min(range(len(left)), key=costs.__getitem__))
        plan = plan.without(attention=attention, mlp=mlp)
        path.append(plan)
    return _spread(path, task.n_plans - 1)


def _spread(items: Sequence[T], count: int) -> list[T]:
    """`count` of the items, evenly spread, first and last included; all where there are fewer."""
    if count >= len(items) or count < 2:
        return list(items)[-count:] if count < 2 else list(items)
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


class AnswerDivergence:
    """How far a plan's next-token distributions lie from the full model's, along the full model's own answers.

    Mean KL(full || plan) in nats over the answer tokens of a few prompts.
    """

    MAX_TOKENS = 4
    """Tokens of each answer that count, so that one long answer does not outweigh many short ones."""

    BATCH = 4
    """Prompts of like length that run together, so that little is padded."""

    def __init__(self, task: MenuTask) -> None:
        self._model = task.model
        full = LayerPlan.full(task.n_layers)
        ordered = sorted(task.prompts, key=lambda text: len(task.tokenizer(text).input_ids))
        groups = [ordered[i : i + self.BATCH] for i in range(0, len(ordered), self.BATCH)]
        self._batches = [self._batch(task, group, full) for group in groups]
        self._full = self._log_probabilities(full)

    def of(self, plan: LayerPlan) -> float:
        other = self._log_probabilities(plan)
        return float((self._full.exp() * (self._full - other)).sum(-1).mean())

    def _batch(
        self, task: MenuTask, prompts: Sequence[str], full: LayerPlan
    ) -> tuple[dict[str, torch.Tensor], list[int]]:
        """Prompts with their answers [B, S], left-padded so that all answers end in the last column; answer lengths."""
        found = answer_batch(task.model, task.tokenizer, prompts, full, task.decoding)
        answers = [answer.token_ids[: self.MAX_TOKENS] for answer in found]
        ids = [task.tokenizer(text).input_ids + answer for text, answer in zip(prompts, answers, strict=True)]
        batch = task.tokenizer.pad({"input_ids": ids}, return_tensors="pt", padding_side="left").to(task.model.device)
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        if "position_ids" in inspect.signature(task.model.forward).parameters:
            inputs["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        return inputs, [len(answer) for answer in answers]

    def _log_probabilities(self, plan: LayerPlan) -> torch.Tensor:
        """[T, vocabulary] for the T answer tokens of all prompts, in float32."""
        with apply_plan(self._model, plan):
            return torch.cat([self._answer_logits(*batch) for batch in self._batches]).log_softmax(-1)

    @torch.inference_mode()
    def _answer_logits(self, inputs: dict[str, torch.Tensor], counts: list[int]) -> torch.Tensor:
        options: dict[str, Any] = {"use_cache": False}
        if "logits_to_keep" in inspect.signature(self._model.forward).parameters:
            options["logits_to_keep"] = max(counts) + 1
        logits = self._model(**inputs, **options).logits
        return torch.cat([row[-count - 1 : -1] for row, count in zip(logits, counts, strict=True)]).float()
