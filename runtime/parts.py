"""What an allocator is made of, and whether a model is the one that it was made for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase

from backbone.errors import InputError, PlanError, WrongModelError
from backbone.families import check_is_model, model_fingerprint
from backbone.healing.healing import Healing, ReadyHealing
from backbone.plan import PlanMenu
from controller.base import ChoiceRule, Controller, FittedPredictor
from controller.certificate.certificate import Certificate
from controller.certificate.drift import DriftAlarm
from controller.certificate.outliers import OutlierTest
from controller.features import Projection
from oracle.chat import ChatError, Question, Rendered, Turns, padded_prompts, rendered
from oracle.decoding import Decoding
from runtime.chat_format import ChatFormat
from runtime.plan_selection import PlanSelector

Prompts = str | Mapping[str, str] | Turns | Iterable[str | Turns]
"""Texts and conversations, or a single text, message or conversation."""

_ROUNDED = ", in float16, which rounds weights: load it in bfloat16 or float32 if it is the same model"


@dataclass(frozen=True)
class OperatingPoint:
    """A certified bound with its price, and the alarm of the prompts that it was certified on."""

    certificate: Certificate
    drift: DriftAlarm | None


@dataclass(frozen=True)
class AllocatorParts:
    """All that is saved of an allocator.

    Attributes:
        menu: the plans to choose from.
        controller: predicts what each plan loses; `controller_name` is its name in `CONTROLLERS`.
        projection: from raw features to the controller's.
        certificate: its price decides; without a valid price every prompt runs the full plan.
        decoding: how the answers behind the certificate were generated.
        fingerprint: of the model it was made for.
        model_source: where that model was loaded from.
        healing: bridges and an adapter for the shortened plans.
        acceptance: for each plan of the menu the share of its tokens that the full model says too, for the lossless
            mode; None where no label told.
        drift: watches whether prompts are like those of the certificate. While it is active every prompt runs the full
            plan. None to do without: `dataclasses.replace(allocator, drift=None)`.
        outliers: sends prompts unlike all known ones to the full plan; None where it is off.
        chat: the chat template that its prompts were rendered with; None where they were given as they are.
        others: further certified points, with prices and alarms of their own; see `at`.
    """

    menu: PlanMenu
    controller: Controller
    controller_name: str
    projection: Projection
    certificate: Certificate
    decoding: Decoding
    fingerprint: str
    model_source: str
    healing: Healing | None = None
    drift: DriftAlarm | None = None
    outliers: OutlierTest | None = None
    acceptance: tuple[float, ...] | None = None
    chat: ChatFormat | None = None
    others: tuple[OperatingPoint, ...] = ()

    def __repr__(self) -> str:
        found = self.certificate
        bound = f", certified: {found.risk}, keep {found.keep:g}, confidence {1 - found.delta:g}"
        by = f"{self.decides_by}{'' if found.price is None else bound}"
        return f"{type(self).__name__}({self.model_source!r}, {self.menu}, {self.controller_name}, {by})"

    @property
    def decides_by(self) -> str:
        """What chooses plans, in words."""
        price, plan = self.certificate.price, self.certificate.plan
        if plan is not None:
            return f"one plan for all, {self.menu.plans[plan]}"
        return "no certified price: all run the full model" if price is None else f"price {price:.4g}"

    @property
    def keeps(self) -> list[float]:
        """The values of `keep` that are certified."""
        own = [] if self.certificate.price is None else [self.certificate.keep]
        return sorted([*own, *(point.certificate.keep for point in self.others)])

    @property
    def rule(self) -> ChoiceRule:
        """How plans are chosen at a price, or which one is."""
        return ChoiceRule(np.array(self.menu.budgets), self.certificate.risk, self.certificate.plan)

    def at(self, keep: float) -> Self:
        """The same at another certified bound: answers keep at least `keep` of the full model's mean score.

        Raises:
            PlanError: a bound that is not certified; the message lists those that are.
        """
        if keep == self.certificate.keep and self.certificate.price is not None:
            return self
        points = [OperatingPoint(self.certificate, self.drift), *self.others]
        for point in self.others:
            if point.certificate.keep == keep:
                rest = tuple(one for one in points if one is not point and one.certificate.price is not None)
                return replace(self, certificate=point.certificate, drift=point.drift, others=rest)
        known = ", ".join(f"{one:g}" for one in self.keeps) or "none"
        raise PlanError(f"keep={keep!r:.40} is not certified; certified are: {known}")

    def assuming(self, parts: tuple[str, ...]) -> Self:
        """The same with certificates that say which of its files they were made with."""
        others = (replace(one, certificate=replace(one.certificate, assumes=parts)) for one in self.others)
        return replace(self, certificate=replace(self.certificate, assumes=parts), others=tuple(others))

    def check_model(self, model: PreTrainedModel) -> None:
        """Raises WrongModelError for a model with other weights."""
        check_is_model(model)
        if (found := model_fingerprint(model)) != self.fingerprint:
            raise WrongModelError(
                f"this allocator was made for {self.fingerprint} ({self.model_source}), "
                f"the model given is {found}{_ROUNDED if model.dtype == torch.float16 else ''}"
            )

    def prepare(self, model: PreTrainedModel) -> ReadyHealing | None:
        """Check the model; returns the healing as it runs with it, whose first call takes a moment and memory.

        Raises:
            WrongModelError: another model, or healing parts that change layers which the probe runs.
        """
        self.check_model(model)
        if self.healing is None:
            return None
        healing, depth = self.healing.ready(model), self.menu.probe_depth
        if min(healing.changed, default=depth) < depth:
            raise WrongModelError(
                f"this allocator's healing changes layer {min(healing.changed)}, but every plan goes on from what "
                f"the full model's first {depth} layers (probe_depth) made of the prompt"
            )
        return healing

    def rendered(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompt: str | Mapping[str, str] | Turns | Question,
        *,
        raw: bool = False,
    ) -> str:
        """A prompt's text, rendered as the prompts of the certificate were; `inputs` tokenizes it.

        Args:
            tokenizer: of the model, with this allocator's chat template, unless that was given as a file.
            prompt: what the user says, or a conversation whose last turn is the user's: `[{"role": "user", "content":
                "..."}]`, or that turn alone. A text that was rendered before stays what it is.
            raw: the text is what the model is to continue, without the template.

        Raises:
            ChatError: another template at hand, or a conversation without one, or that it cannot render.
        """
        if isinstance(prompt, Rendered):
            return prompt
        if isinstance(prompt, Mapping):
            prompt = [prompt]
        question = prompt if isinstance(prompt, Question) else Question.of(prompt, raw=raw)
        return rendered(question, None if self.chat is None or question.raw else self.chat.template(tokenizer))

    def with_chat_template(self, path: str | Path) -> Self:
        """The same, with the text of its chat template from a file. Raises ChatError for another template than its."""
        if self.chat is None:
            raise ChatError(
                f"the chat template {path} was given for an allocator whose prompts are given as they are; leave it out"
            )
        return replace(self, chat=self.chat.of_text(Path(path)))

    def inputs(self, tokenizer: PreTrainedTokenizerBase, prompts: Prompts, *, raw: bool = False) -> BatchEncoding:
        """Prompts, or a single one, as the inputs of `generate`, left-padded [B, S], rendered as `rendered` says."""
        check_is_tokenizer(tokenizer)
        return padded_prompts(tokenizer, [self.rendered(tokenizer, prompt, raw=raw) for prompt in listed(prompts)])

    @cached_property
    def predictor(self) -> FittedPredictor:
        """The losses of plans, from features of prompts."""
        return FittedPredictor(self.projection, self.controller, self.outliers)

    @cached_property
    def has_own_decoding(self) -> bool:
        """Whether its decoding is the one that it was certified with."""
        return self.certificate.decoding in ("", str(self.decoding))

    def selector(self, limit_ms: float | None = None) -> PlanSelector:
        """What chooses plans for prompts, with a limit to the time it may take."""
        return PlanSelector(self.menu, self.predictor, self.rule, self.certificate.price, self.drift, limit_ms)


def listed(prompts: Prompts | Question) -> list[str | Turns]:
    """Several prompts, or a single text, message or conversation, as a list. Raises ChatError for anything else."""
    if isinstance(prompts, str | Question):
        return [prompts]  # type: ignore[list-item]
    if isinstance(prompts, Mapping):
        return [[prompts]]
    if not isinstance(prompts, Iterable):
        raise ChatError(f"prompts are texts or conversations, got {prompts!r:.80}")
    found: list[Any] = list(prompts)
    return [found] if found and isinstance(found[0], Mapping) else found


def check_is_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises InputError for anything else, such as prompts or a model in its place."""
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise InputError(f"a tokenizer is needed, got a {type(tokenizer).__name__}; give the one of the model")
