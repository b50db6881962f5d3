"""Whether a model is the one that an allocator was made for, and the allocator's stand-ins attached to it once."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel

from backbone.errors import InputError
from backbone.fingerprint import model_fingerprint
from backbone.stand_ins.attaching import attach, attached_digest, attached_to

if TYPE_CHECKING:
    from runtime.allocator import Allocator

_attaching = threading.Lock()


_ROUNDED = ", in float16, which rounds weights: load it in bfloat16 or float32 if it is the same model"


class WrongModelError(InputError):
    """An allocator was used with a model that it was not made for."""


def check_model(allocator: Allocator, model: PreTrainedModel) -> None:
    """See `Allocator.check_model`."""
    if (found := model_fingerprint(model)) != allocator.fingerprint:
        raise WrongModelError(
            f"this allocator was made for {allocator.fingerprint} ({allocator.model_source}), "
            f"the model given is {found}{_ROUNDED if model.dtype == torch.float16 else ''}"
        )
    own = "" if allocator.stand_ins is None else allocator.stand_ins.digest
    others = attached_digest(model, allocator.menu.plans[0])
    if others not in ("", own):
        raise WrongModelError(
            f"this model has stand-ins {others} attached, this allocator comes with {own or 'none'}: "
            "call layerbudget.detach(model) first, or load the model a second time"
        )


def attach_once(allocator: Allocator, model: PreTrainedModel) -> None:
    """Attach the allocator's stand-ins to a model that passed `check_model`, unless they are attached.

    Raises:
        WrongModelError: they change layers that the probe runs.
    """
    plan, depth = allocator.menu.plans[0], allocator.menu.probe_depth
    if allocator.stand_ins is not None:
        with _attaching:
            if not attached_digest(model, plan):
                attach(model, allocator.stand_ins)
    attached = attached_to(model, plan)
    if attached is not None and min(attached.changed, default=depth) < depth:
        raise WrongModelError(
            f"this allocator's stand-ins change layer {min(attached.changed)}, but every plan goes on from what "
            f"the full model's first {depth} layers (probe_depth) made of the prompt"
        )
