"""Export of a plan as an ordinary, shorter checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from backbone.errors import InputError
from backbone.execution.delete_layers import delete_layers
from backbone.families import decoder_layers
from backbone.files import UNFINISHED
from backbone.plan import LayerPlan
from runtime.parts import AllocatorParts


class ExportError(InputError):
    """A plan that no ordinary checkpoint can hold, or a folder that is there."""


def export_plan(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    folder: Path,
    allocator: AllocatorParts | None = None,
) -> int:
    """Write the layers of a plan, renumbered, with an allocator's adapter merged.

    Args:
        model: the full model. Its weights are changed where there is an adapter.
        tokenizer: of the model; is written too.
        text: the plan.
        folder: is made; if that is interrupted nothing is left under its name.
        allocator: made for this model, whose plans may have healing parts.

    Returns:
        The number of layers written.

    Raises:
        PlanError: no plan of this model, or one that runs half of a layer.
        WrongModelError: another model than the allocator's.
        ExportError: the plan has bridges, or the folder is there.
    """
    plan = LayerPlan.parse(text, len(decoder_layers(model)))
    if folder.exists():
        raise ExportError(f"{folder} is there already; name a folder that is not")
    if plan.healed:
        raise ExportError(f"plan {plan} has an exit head, which no ordinary checkpoint holds")
    if allocator is not None:
        _merge(model, plan, allocator)
    short = delete_layers(model, plan)
    unfinished = folder.with_name(folder.name + UNFINISHED)
    shutil.rmtree(unfinished, ignore_errors=True)
    short.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    unfinished.rename(folder)
    return len(decoder_layers(short))


def _merge(model: PreTrainedModel, plan: LayerPlan, allocator: AllocatorParts) -> None:
    allocator.check_model(model)
    healing = allocator.healing
    if healing is None or plan.is_full:
        return
    if plan in healing.bridges:
        raise ExportError(
            f"plan {plan} has bridges, which no ordinary checkpoint holds: serve it with layerbudget-vllm, or make an "
            "allocator with adapt.method: adapter"
        )
    if healing.adapter is not None:
        for name, weight in healing.adapter.merged(model).items():
            model.get_parameter(name).data.copy_(weight)
