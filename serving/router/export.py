"""Export of a plan as an ordinary, shorter checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from backbone.errors import InputError
from backbone.execution.delete_layers import delete_layers
from backbone.families import decoder_layers, family_of
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
        ExportError: the plan has bridges, the folder is there, or no configuration gives these layers.
    """
    plan = LayerPlan.parse(text, len(decoder_layers(model)))
    clear_place(folder)
    if plan.healed:
        raise ExportError(f"plan {plan} has an exit head, which no ordinary checkpoint holds")
    if allocator is not None:
        _merge(model, plan, allocator)
    short = delete_layers(model, plan)
    _check_configuration(short, plan)
    unfinished = folder.with_name(folder.name + UNFINISHED)
    short.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    unfinished.rename(folder)
    return len(decoder_layers(short))


def clear_place(folder: Path) -> None:
    """Remove what an interrupted export left. Raises ExportError for a folder that is there, OSError for no place."""
    if folder.exists():
        raise ExportError(f"{folder} is there already; name a folder that is not")
    unfinished = folder.with_name(folder.name + UNFINISHED)
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    unfinished.rmdir()


def _check_configuration(short: PreTrainedModel, plan: LayerPlan) -> None:
    """Raises ExportError unless the configuration alone gives layers with the modules and settings of these."""
    with torch.device("meta"):
        made = type(short)(type(short.config).from_dict(short.config.to_dict()))
    family = family_of(short)
    others = getattr(made.get_submodule(family.decoder), family.layers)
    for number, layer, other in zip(sorted(plan.attention), decoder_layers(short), others, strict=True):
        if not _is_like(layer, other):
            raise ExportError(
                f"no ordinary checkpoint holds plan {plan}: a {type(short).__name__} of {len(others)} layers has "
                f"another kind of layer in the place of layer {number}; serve the full model under this plan instead"
            )


def _is_like(layer: nn.Module, other: nn.Module) -> bool:
    """Whether two layers have the same modules, and the same public settings where both have them."""
    parts, others = dict(layer.named_modules()), dict(other.named_modules())
    return parts.keys() == others.keys() and all(
        value == vars(others[path]).get(name, value)
        for path, part in parts.items()
        for name, value in vars(part).items()
        if isinstance(value, bool | int | float | str | None) and name != "training" and not name.startswith("_")
    )


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
