"""Controllers as files: what is read is checked, since a file may be damaged or come from anybody."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from backbone.strict_json import parse
from controller.base import LearningError

WEIGHTS, DESCRIPTION = "controller.safetensors", "controller.json"

Layout = Mapping[str, tuple[str, ...]]
"""For each tensor the names of its dimensions; equal names are equal sizes."""


def read_weights(folder: Path, layout: Layout) -> dict[str, torch.Tensor]:
    """The tensors of `controller.safetensors`.

    Raises:
        LearningError: other tensors than those of the layout, other shapes, or numbers that are not finite float32.
    """
    path = folder / WEIGHTS
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise LearningError(f"{path} holds no controller: {error}") from None
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if not _fits(shapes, layout):
        raise LearningError(
            f"{path} holds no controller of this kind: its tensors are {shapes}, expected {dict(layout)}"
        )
    if not all(tensor.dtype == torch.float32 and bool(tensor.isfinite().all()) for tensor in tensors.values()):
        raise LearningError(f"{path} holds no controller: some of its numbers are not finite, or not float32")
    return tensors


def write_description(folder: Path, data: dict[str, Any]) -> None:
    """Write `controller.json`."""
    text = json.dumps(data)
    (folder / DESCRIPTION).write_text(json.dumps({"sha256": _sha256(text), "data": text}), encoding="utf-8")


def read_description(folder: Path, kinds: Mapping[str, type]) -> dict[str, Any]:
    """What `write_description` wrote, whole: some libraries end the process when they are given half a text.

    Args:
        folder: in which the file lies.
        kinds: the type of each entry.

    Raises:
        LearningError: a damaged file, or one with other entries.
    """
    path = folder / DESCRIPTION
    try:
        content = parse(path.read_text(encoding="utf-8"))
        whole = content["sha256"] == _sha256(content["data"])
        data: dict[str, Any] = parse(content["data"]) if whole else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise LearningError(f"{path} holds no controller: {error}") from None
    if not whole:
        raise LearningError(f"{path} is damaged: its content does not match its SHA-256")
    if not isinstance(data, dict) or {name: type(value) for name, value in data.items()} != kinds:
        raise LearningError(f"{path} holds no controller of this kind: expected {', '.join(kinds)}")
    return data


def _fits(shapes: Mapping[str, tuple[int, ...]], layout: Layout) -> bool:
    if shapes.keys() != layout.keys() or any(len(shapes[name]) != len(layout[name]) for name in layout):
        return False
    sizes: dict[str, int] = {}
    pairs = [pair for name in layout for pair in zip(layout[name], shapes[name], strict=True)]
    return all(size > 0 and sizes.setdefault(dimension, size) == size for dimension, size in pairs)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
