"""Is it worth while to lead plans along the full model's answers? A few prompts of a block tell.

Leading costs a pass over each prompt, which plans share as far as they begin alike; what it does not settle is
generated all the same. Early exits share nearly everything, and leading settles most of them for little. Plans with a
gap of their own share little, and where prompts are longer than answers, leading them costs more than it saves.
"""

from __future__ import annotations

from collections.abc import Mapping

from transformers import PreTrainedModel

from backbone.execution.shared_passes import layers_of_shared_passes
from backbone.plan import LayerPlan

TRIAL = 8
"""Prompts of a block that are led under all plans."""


def worth_verifying(model: PreTrainedModel, saved: Mapping[LayerPlan, float], spent: float) -> list[LayerPlan]:
    """The plans that save most if they are led together, found by leaving out one after another; perhaps none.

    Args:
        model: whose healing parts say how far plans begin alike.
        saved: for each plan that was led on a trial, forward tokens that generating what it settled would have taken.
        spent: forward tokens of the trial.
    """
    together = layers_of_shared_passes(model, list(saved))

    def gain(plans: list[LayerPlan]) -> float:
        if not plans:
            return 0.0
        return sum(saved[plan] for plan in plans) - spent * layers_of_shared_passes(model, plans) / together

    led = list(saved)
    while led:
        fewer = max(([plan for plan in led if plan != left_out] for left_out in led), key=gain)
        if gain(fewer) < gain(led):
            break
        led = fewer
    return led
