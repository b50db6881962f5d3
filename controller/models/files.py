"""Files of controllers, checked when read, since they may be damaged or foreign."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from backbone.strict_json import parse
from controller.base import LearningError, LossRange, fitted

WEIGHTS = "controller.safetensors"

Layout = Mapping[str, tuple[str, ...]]
"""For each tensor the names of its dimensions; equal names are equal sizes."""

_ABOUT, _LEAST = "controller", "least_loss"
"""The one entry of metadata: the library writes several in an order that changes from process to process."""


def read_weights(
    folder: Path, layout: Layout, types: Mapping[str, torch.dtype] | None = None
) -> dict[str, torch.Tensor]:
    """Read and check the tensors of `controller.safetensors`.

    Args:
        folder: of the file.
        layout: its tensors.
        types: of those that are not float32.

    Raises:
        LearningError: other tensors, shapes or types, or numbers that are not finite.
    """
    path = folder / WEIGHTS
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise LearningError(f"{path} holds no controller: {error}") from None
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if not _fits(shapes, layout):
        raise LearningError(
            f"{path} holds no controller of this kind: its tensors are {shapes!s:.200}, expected {dict(layout)}"
        )
    for name, tensor in tensors.items():
        kind = (types or {}).get(name, torch.float32)
        if tensor.dtype != kind or not bool(tensor.isfinite().all()):
            right = str(kind).removeprefix("torch.")
            raise LearningError(f"{path} holds no controller: some numbers of {name} are not finite, or not {right}")
    return tensors


def metadata_of(loss_range: LossRange | None, **about: Any) -> dict[str, str]:
    """Metadata for `controller.safetensors` that `read_metadata` reads."""
    return {_ABOUT: json.dumps({_LEAST: fitted(loss_range).least, **about})}


def read_metadata(folder: Path, kinds: Mapping[str, type]) -> tuple[LossRange | None, dict[str, Any]]:
    """The range of the losses, and entries of the types in `kinds`; raises LearningError for others.

    The range is None in a file of before controllers predicted losses.
    """
    path = folder / WEIGHTS
    try:
        with safe_open(path, "pt") as file:
            about: Any = parse((file.metadata() or {}).get(_ABOUT, "{}"))
    except (OSError, SafetensorError, ValueError) as error:
        raise LearningError(f"{path} holds no controller of this kind: {error}") from None
    least = about.pop(_LEAST, None) if isinstance(about, dict) else None
    if not isinstance(about, dict) or {name: type(value) for name, value in about.items()} != kinds:
        raise LearningError(f"{path} holds no controller of this kind: expected {', '.join(kinds)}, got {about!r:.80}")
    if least not in (None, -1.0, 0.0):
        raise LearningError(f"{path} holds no controller: its least loss is {least!r:.80}, not -1 or 0")
    return None if least is None else LossRange(float(least)), about


def _fits(shapes: Mapping[str, tuple[int, ...]], layout: Layout) -> bool:
    if shapes.keys() != layout.keys() or any(len(shapes[name]) != len(layout[name]) for name in layout):
        return False
    sizes: dict[str, int] = {}
    pairs = [pair for name in layout for pair in zip(layout[name], shapes[name], strict=True)]
    return all(size > 0 and sizes.setdefault(dimension, size) == size for dimension, size in pairs)
