"""Train an adapter and the bridges by self-distillation: the full model is the teacher, its shortened plans students.

Each step runs some plans over prompts with the full model's answers, and lowers the KL divergence from its next-token
distributions (Hinton et al. 2015, arXiv 1503.02531). The plans are the cheapest, the largest shortened one and some
drawn at random (the sandwich rule, Yu and Huang 2019, arXiv 1903.05134, section 3.2). References can be targets too
(Sorted Fine-Tuning, Valipour et al. 2023, arXiv 2309.08968).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from backbone.errors import InputError
from backbone.healing.healing import Bridges, Healing
from backbone.healing.settings import DistillSettings
from backbone.healing.trained_parts import Checkpoint, Trainable, adapted_layers
from backbone.healing.training_targets import DistillationLoss, Example, contiguous_head
from backbone.left_padding import by_tokens
from backbone.plan import LayerPlan

TRIAL_STEPS = 4
"""Steps timed before training to turn `minutes` into a number of steps; at least 2."""
CHECKPOINT = "checkpoint.safetensors"
"""Name of the checkpoint in the folder of the training."""


@dataclass(slots=True)
class History:
    """The course of a training; lists have one entry for each evaluation, in order.

    Attributes:
        steps: training steps done.
        losses: mean training loss since the evaluation before, None at the first. The loss of a plan is divided by its
            held-out loss before training.
        held: mean KL divergence in nats on held-out examples, by plan.
        seconds: training time up to the end of the evaluation, earlier processes of a resumed training included.
        tokens: tokens trained on, times the plans of their step.
        planned: number of steps, if nothing ends training earlier.
        ended: why training ended; empty while it goes on.
    """

    steps: list[int] = field(default_factory=list)
    losses: list[float | None] = field(default_factory=list)
    held: list[dict[str, float]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    tokens: int = 0
    planned: int = 0
    ended: str = ""


def distil(
    model: PreTrainedModel,
    examples: Sequence[Example],
    plans: Sequence[LayerPlan],
    bridges: Bridges,
    probe_depth: int,
    settings: DistillSettings,
    folder: Path,
    fingerprint: str,
    looked: Callable[[History], None] = lambda history: None,
) -> tuple[Healing, History]:
    """Train healing parts for shortened plans; resumes from the checkpoint in `folder`.

    A resumed training ends with the same result as an uninterrupted one. With `settings.minutes` this holds after the
    first evaluation, which fixes the number of steps. The model is left as it was, also by an error. With too little
    memory for a batch its gradients are summed over smaller ones, equal up to rounding. `looked` is called after each
    evaluation.

    Returns:
        The healing with the lowest loss on held-out examples, and the history. A loss that is not finite ends training.

    Raises:
        InputError: all examples are held out.
        UnsupportedModelError: a model that LoRA cannot be trained on.
    """
    layers = adapted_layers(plans, probe_depth, settings.where)
    grads = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in grads:
        parameter.requires_grad_(False)
    try:
        trainable = Trainable(model, plans, bridges, layers, settings.where, settings.rank, settings.seed)
        with closing(trainable), contiguous_head(model):
            history = _Run(model, trainable, examples, settings, Checkpoint(folder / CHECKPOINT), looked).go()
            adapter, trained = trainable.result()
    finally:
        for parameter in grads:
            parameter.requires_grad_(True)
    return Healing(fingerprint, trained, adapter), history


class _Run:
    """One training. All random draws of a step follow from the seed and the number of the step."""

    def __init__(
        self,
        model: PreTrainedModel,
        trainable: Trainable,
        examples: Sequence[Example],
        settings: DistillSettings,
        checkpoint: Checkpoint,
        looked: Callable[[History], None],
    ) -> None:
        self._model, self._trainable, self._settings = model, trainable, settings
        self._checkpoint, self._looked = checkpoint, looked
        n_held = max(1, round(settings.held * len(examples)))
        if n_held >= len(examples):
            raise InputError(f"{len(examples)} examples are too few to train on: {n_held} are held out; give more")
        mixed = [examples[i] for i in np.random.default_rng(settings.seed).permutation(len(examples))]
        self._held_batches = self._batches(mixed[:n_held])
        self._train_batches = self._batches(mixed[n_held:])
        self._steps = max(1, math.ceil(settings.epochs * len(self._train_batches)))
        """Planned number; the first evaluation replaces it if `settings.minutes` is given."""
        rates = {True: settings.bridge_learning_rate, False: settings.learning_rate}
        groups = [
            {"params": [p for n, p in trainable.parameters.items() if trainable.is_bridge(n) == bridge], "lr": rate}
            for bridge, rate in rates.items()
        ]
        self._optimizer = torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=0.0)
        self._peak_rates = [group["lr"] for group in self._optimizer.param_groups]
        self._distillation_loss = DistillationLoss(model, trainable, settings.vocabulary, settings.seed)
        self._n_parts = 1
        self._untrained: dict[str, float] = {}
        self._plans = sorted(trainable.plans, key=lambda plan: (plan.layers, str(plan)))

    def go(self) -> History:
        history, best, bad, first = History(), math.inf, 0, 0
        evaluated_at, losses, start = -1, list[float](), time.perf_counter()
        if (resumed := self._checkpoint.load(self._trainable.parameters, self._optimizer)) is not None:
            history, best, bad, first = History(**resumed["history"]), resumed["best"], resumed["bad"], resumed["step"]
            evaluated_at, self._untrained, self._steps = first, history.held[0], history.planned
            start -= history.seconds[-1]
        for step in count(first):  # an evaluation ends the loop, at the latest after the last planned step
            if step != evaluated_at and (step % self._settings.evaluate_every == 0 or step == self._steps):
                held = self._evaluate()
                mean = sum(self._relative(plan, loss) for plan, loss in held.items()) / len(held)
                better = mean < best or not history.steps
                best, bad = (mean, 0) if better else (best, bad + 1)
                history.steps.append(step)
                history.losses.append(sum(losses) / len(losses) if losses else None)
                history.held.append(held)
                history.seconds.append(time.perf_counter() - start)
                history.planned, history.ended = self._steps, self._end_reason(step, mean, bad)
                losses.clear()
                state = {"history": asdict(history), "best": best, "bad": bad, "step": step}
                self._checkpoint.save(self._trainable.parameters, self._optimizer, state, better=better)
                self._looked(history)
            if history.ended:
                break
            loss, tokens = self._step(step)
            losses.append(loss)
            history.tokens += tokens
            if not math.isfinite(loss):
                history.ended = f"stopped at step {step}: the loss is {loss}; the best parameters so far are kept"
                break
        self._checkpoint.load_best(self._trainable.parameters)
        return history

    def _steps_in(self, seconds: float, evaluation: float) -> int:
        """Number of steps that fit into a time, evaluations included, by the second slowest of a few timed steps."""
        took = []
        for step in range(TRIAL_STEPS):
            start = time.perf_counter()
            self._gradients(self._batch(step), self._plans_of(step), step)
            took.append(time.perf_counter() - start)
        each = sorted(took)[-2] + evaluation / self._settings.evaluate_every
        return max(1, int((seconds - 2 * evaluation - sum(took)) / each))

    def _relative(self, plan: str, loss: Any) -> Any:
        """A plan's loss divided by its held-out loss before training, so that poor plans do not outweigh good ones."""
        return loss / max(self._untrained[plan], 1e-3)

    def _end_reason(self, step: int, mean: float, bad: int) -> str:
        if not math.isfinite(mean):
            return f"stopped at step {step}: the held-out loss is {mean}; the best parameters so far are kept"
        if bad >= self._settings.patience:
            return f"stopped at step {step}: the held-out loss was lowest {bad} evaluations ago"
        return "all steps done" if step == self._steps else ""

    def _batches(self, examples: Sequence[Example]) -> list[list[Example]]:
        return by_tokens(examples, [len(example.tokens) for example in examples], self._settings.batch_tokens)

    def _step(self, step: int) -> tuple[float, int]:
        """Make one step of the optimiser; returns the mean loss of its plans, and its tokens times plans."""
        batch, plans = self._batch(step), self._plans_of(step)
        self._set_rates(step)
        loss = self._gradients(batch, plans, step)
        if math.isfinite(loss):
            nn.utils.clip_grad_norm_(list(self._trainable.parameters.values()), 1.0)
            self._optimizer.step()
        return loss, len(plans) * sum(len(example.tokens) for example in batch)

    def _batch(self, step: int) -> list[Example]:
        epoch, index = divmod(step, len(self._train_batches))
        order = np.random.default_rng([self._settings.seed, 1, epoch]).permutation(len(self._train_batches))
        return self._train_batches[order[index]]

    def _gradients(self, batch: Sequence[Example], plans: Sequence[LayerPlan], step: int) -> float:
        """Compute the gradients of a step, in smaller parts where memory is short; returns the loss."""
        while True:
            self._optimizer.zero_grad(set_to_none=True)
            try:
                return sum(self._backward(part, plans, step, batch) for part in _split(batch, self._n_parts))
            except (torch.OutOfMemoryError, MemoryError):
                if self._n_parts >= len(batch):
                    raise
                self._n_parts *= 2

    def _plans_of(self, step: int) -> list[LayerPlan]:
        """Plans of a step by the sandwich rule: the cheapest, the largest, and others drawn at random."""
        count = self._settings.plans_per_step
        fixed = list(dict.fromkeys([self._plans[0], self._plans[-1]]))[: count - 1]
        others = [plan for plan in self._plans if plan not in fixed]
        drawn = np.random.default_rng([self._settings.seed, 2, step]).permutation(len(others))[: count - len(fixed)]
        return fixed + [others[i] for i in drawn]

    def _set_rates(self, step: int) -> None:
        """Set learning rates: linear warm-up over 5% of the steps, then a half cosine down to 5% of the peak."""
        warm = max(1, self._steps // 20)
        share = min(1.0, (step + 1) / warm) * (0.525 + 0.475 * math.cos(math.pi * step / self._steps))
        for group, peak in zip(self._optimizer.param_groups, self._peak_rates, strict=True):
            group["lr"] = peak * share

    def _backward(
        self, part: Sequence[Example], plans: Sequence[LayerPlan], step: int, whole: Sequence[Example]
    ) -> float:
        losses = self._distillation_loss.losses(part, plans, step)
        relative = [self._relative(str(plan), loss) for plan, loss in losses.items()]
        loss = torch.stack(relative).sum() / (len(plans) * sum(example.answer for example in whole))
        if torch.isfinite(loss):
            loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    def _evaluate(self) -> dict[str, float]:
        """Mean loss of every plan on held-out examples; the first evaluation fixes the number of steps."""
        start = time.perf_counter()
        held = self._held_losses()
        if not self._untrained:
            self._untrained = held
            if self._settings.minutes is not None:
                self._steps = self._steps_in(self._settings.minutes * 60, time.perf_counter() - start)
        return held

    @torch.no_grad()
    def _held_losses(self) -> dict[str, float]:
        sums = {str(plan): 0.0 for plan in self._plans}
        for number, batch in enumerate(self._held_batches):
            for plan, loss in self._distillation_loss.losses(batch, self._plans, -1 - number).items():
                sums[str(plan)] += float(loss)
        answers = sum(example.answer for batch in self._held_batches for example in batch)
        return {plan: total / answers for plan, total in sums.items()}


def _split(batch: Sequence[Example], parts: int) -> Iterator[Sequence[Example]]:
    size = math.ceil(len(batch) / parts)
    return (batch[start : start + size] for start in range(0, len(batch), size))
