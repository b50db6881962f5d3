"""The saved artefact: prompt in, plan out; probe, controller, menu, certified price and drift alarm."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.utils import GenerateDecoderOnlyOutput

from backbone.errors import InputError
from backbone.loading import model_fingerprint
from backbone.plan import LayerPlan, PlanMenu
from backbone.stand_ins import StandIns, attach, attached_digest
from controller.base import Controller, choose
from controller.certificate import Certificate
from controller.drift import DriftAlarm
from controller.features import prompt_features
from controller.projection import Projection
from oracle.decoding import Decoding
from runtime.generation import UnsupportedGenerationError, decode_in_lanes, row_copies

logger = logging.getLogger(__name__)
_attaching = threading.Lock()


class WrongModelError(InputError):
    """An allocator was used with a model that it was not made for."""


@dataclass(frozen=True)
class Allocator:
    """Chooses a layer plan for each prompt and generates with it.

    Use `allocator.generate(model, **inputs, ...)`, or pass it to the model: `model.generate(**inputs,
    custom_generate=allocator, ...)`. Both take and return what stock `generate()` does.

    Attributes:
        menu: the plans to choose from.
        controller: predicts what each plan keeps; `controller_name` is its name in `CONTROLLERS`.
        projection: from raw features to the controller's.
        certificate: its price decides; without a valid price every prompt runs the full plan.
        decoding: how the answers behind the certificate were generated.
        fingerprint: of the model it was made for.
        model_source: where that model was loaded from.
        stand_ins: bridges and an adapter for the shortened plans. `allocate` and `generate` attach them to the model,
            which without a plan stays what it is, bit for bit.
        drift: watches whether prompts are like those of the certificate. Once it has rung every prompt runs the full
            plan, until `drift.reset()`.
    """

    menu: PlanMenu
    controller: Controller
    controller_name: str
    projection: Projection
    certificate: Certificate
    decoding: Decoding
    fingerprint: str
    model_source: str
    stand_ins: StandIns | None = None
    drift: DriftAlarm | None = None

    @classmethod
    def from_pretrained(cls, source: str | Path, *, revision: str | None = None) -> Allocator:
        """Load a saved allocator from a folder or from a repository on the hub.

        Raises:
            ArtefactError: no allocator there, or a damaged one (every file is checked against its SHA-256).
        """
        from runtime.artefact import load_allocator

        return load_allocator(source, revision)

    def save_pretrained(self, folder: str | Path) -> None:
        """Save to a folder, replacing an allocator that is there; never half-written."""
        from runtime.artefact import save_allocator

        save_allocator(self, Path(folder))

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, token: str | None = None) -> str:
        """Upload to a repository on the hub, made where it is missing; returns its URL."""
        from runtime.artefact import upload_allocator

        return upload_allocator(self, repo_id, private, token)

    def check_model(self, model: PreTrainedModel) -> None:
        """Raises WrongModelError unless `model` has the weights that this allocator was made for, and no stand-ins of
        others."""
        if (found := model_fingerprint(model)) != self.fingerprint:
            raise WrongModelError(
                f"this allocator was made for {self.fingerprint} ({self.model_source}), the model given is {found}"
            )
        own, others = (
            "" if self.stand_ins is None else self.stand_ins.digest,
            attached_digest(model, self.menu.plans[0]),
        )
        if others not in ("", own):
            raise WrongModelError(
                f"this model has stand-ins {others} attached, this allocator comes with {own or 'none'}: "
                "call layerbudget.detach(model) first, or load the model a second time"
            )

    def prepare(self, model: PreTrainedModel) -> None:
        """Check the model and attach the stand-ins to it, once; takes a moment and memory for the changed weights."""
        self.check_model(model)
        if self.stand_ins is not None:
            with _attaching:
                if not attached_digest(model, self.menu.plans[0]):
                    attach(model, self.stand_ins)

    def allocate(
        self, model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **_: Any
    ) -> list[LayerPlan]:
        """The plan of each prompt.

        Args:
            input_ids: [B, S], left-padded.
            attention_mask: [B, S]; all ones if not given.

        Raises:
            WrongModelError: another model than the one this allocator was made for.
        """
        self.prepare(model)
        if self.certificate.price is None or (self.drift is not None and self.drift.rung):
            return [self.menu.plans[-1]] * len(input_ids)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        sets = self.projection.sets
        projected = self.projection(prompt_features(model, input_ids, mask, self.menu.probe_depth, sets))
        if broken := int((~np.isfinite(projected).all(axis=1)).sum()):
            logger.warning("%d prompts have hidden states that are not finite; they run the full plan", broken)
        budgets = np.array(self.menu.budgets)
        chosen = choose(self.controller.predict(projected), budgets, self.certificate.price)
        if self.drift is not None and self.drift.observe(projected, budgets[chosen]):
            logger.warning("prompts are no longer like those of the certificate; from here on all run the full plan")
            return [self.menu.plans[-1]] * len(input_ids)
        return [self.menu.plans[index] for index in chosen]

    def generate(
        self, model: PreTrainedModel, *, streamer: Any = None, **arguments: Any
    ) -> torch.Tensor | GenerateDecoderOnlyOutput:
        """`model.generate(**arguments)`, each prompt under its plan.

        With `return_dict_in_generate=True` the output has `layer_plans`, one a prompt, and `allocation_ms`. A streamer
        works here only: transformers 5.23 does not hand it on to a `custom_generate`.
        """
        loop = partial(self, streamer=streamer)
        return model.generate(**arguments, streamer=streamer, custom_generate=loop)  # type: ignore[operator, no-any-return]

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: GenerationConfig,
        streamer: Any = None,
        synced_gpus: bool = False,
        **model_kwargs: Any,
    ) -> torch.Tensor | GenerateDecoderOnlyOutput:
        """The decoding loop that `generate(custom_generate=allocator)` calls after preparing its inputs."""
        if model_kwargs.get("inputs_embeds") is not None:
            raise UnsupportedGenerationError("an allocator reads input_ids; inputs_embeds cannot be used with it")
        start = time.perf_counter()
        copies = row_copies(generation_config)
        mask = model_kwargs.get("attention_mask")
        plans = self.allocate(model, input_ids[::copies], None if mask is None else mask[::copies])
        allocation_ms = (time.perf_counter() - start) * 1000
        output = decode_in_lanes(
            model,
            [plan for plan in plans for _ in range(copies)],
            input_ids,
            generation_config,
            model_kwargs,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            streamer=streamer,
            synced_gpus=synced_gpus,
        )
        if not isinstance(output, torch.Tensor):
            output["layer_plans"], output["allocation_ms"] = plans, allocation_ms
        return output
