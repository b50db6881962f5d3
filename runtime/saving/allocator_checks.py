"""Whether the files of a saved allocator say what they may, and belong together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from backbone.errors import ArtefactError
from backbone.strict_json import LONGEST_NAME
from controller.base import CONTROLLERS
from oracle.chat import NO_TEMPLATE
from runtime.parts import AllocatorParts
from runtime.saving.file_bundle import CARD, Manifest

FORMAT_VERSION = 8
LARGEST_PART = 2**30
"""Bytes of every file that is loaded as a whole; healing parts are as large as the model asks for."""
MENU, PROJECTION, CERTIFICATE, ACCEPTANCE = "menu.json", "projection.safetensors", "certificate.json", "acceptance.json"
OPTIONAL = {
    "healing": "healing.safetensors",
    "drift": "drift.safetensors",
    "outliers": "outliers.safetensors",
    "chat": "chat.json",
}
"""Parts of an allocator that it may do without, and their files."""
OLD_HEALING = "stand_ins.safetensors"
"""What the file of the healing was called before; still read."""
ENTRIES: dict[tuple[str, ...], tuple[type, int]] = {
    ("layerbudget_version",): (str, LONGEST_NAME),
    ("created",): (str, LONGEST_NAME),
    ("model",): (dict, 0),
    ("model", "fingerprint"): (str, LONGEST_NAME),
    ("model", "source"): (str, 4096),  # may be a path
    ("controller",): (str, LONGEST_NAME),
    ("decoding",): (dict, 0),
    ("chat_template",): (str, LONGEST_NAME),
    ("files",): (dict, 0),
}
"""Of the manifest: where, of what kind, and how many characters long at most."""


def optional_parts(allocator: AllocatorParts) -> tuple[str, ...]:
    """The files of those optional parts that an allocator has."""
    return tuple(file for name, file in OPTIONAL.items() if getattr(allocator, name) is not None)


def files_of_other(number: int) -> tuple[str, str]:
    """Certificate and drift reference of a certified point beside the one that is served, counted from 1."""
    return f"certificate-{number}.json", f"drift-{number}.safetensors"


def chat_hash(allocator: AllocatorParts) -> str:
    """Names the chat template; `none` where prompts are given as they are."""
    return NO_TEMPLATE if allocator.chat is None else allocator.chat.hash


def check_entries(folder: Path, manifest: Manifest) -> None:
    """Raises ArtefactError for a manifest of another format, or with entries of another kind."""
    if (found := manifest.get("format_version")) != FORMAT_VERSION:
        raise ArtefactError(
            f"{folder} has allocator format {found!r}, this version reads {FORMAT_VERSION}; make it again with "
            "`layerbudget run`"
        )
    for path, (kind, longest) in ENTRIES.items():
        value: Any = manifest
        for key in path:
            value = value.get(key)
        name = " of ".join(reversed(path))
        if not isinstance(value, kind):
            raise ArtefactError(f"{folder} is damaged: {name} in manifest.json should be a {kind.__name__}")
        if isinstance(value, str) and len(value) > longest:
            raise ArtefactError(
                f"{folder} is damaged: {name} in manifest.json has {len(value)} characters, at most {longest} are read"
            )
    if (controller := manifest["controller"]) not in CONTROLLERS:
        raise ArtefactError(
            f"{folder} needs the controller {controller!r:.80}, known are {', '.join(CONTROLLERS)}; install the "
            "package that brings it"
        )
    needed = {MENU, PROJECTION, CERTIFICATE, CARD, *CONTROLLERS[controller].FILES}
    if missing := needed - manifest["files"].keys():
        raise ArtefactError(f"{folder} is damaged: manifest.json does not list {min(missing)}")


def check_assumed(allocator: AllocatorParts) -> None:
    """Raises ArtefactError where a certificate was made with something that the allocator has not."""
    chat, decoding = chat_hash(allocator), str(allocator.decoding)
    for certificate in (allocator.certificate, *(point.certificate for point in allocator.others)):
        assumed = {OPTIONAL["healing"] if name == OLD_HEALING else name for name in certificate.assumes}
        if missing := sorted(assumed - {*optional_parts(allocator)}):
            raise ArtefactError(f"its certificate was made with {missing[0]}, which this allocator is without")
        if certificate.chat_template not in ("", chat):
            raise ArtefactError(f"its certificate is for the chat template {certificate.chat_template}, it has {chat}")
        if certificate.decoding not in ("", decoding):
            raise ArtefactError(
                f"its certificate is for answers by {certificate.decoding!r:.120}, it has {decoding!r:.120}"
            )


def check_together(allocator: AllocatorParts) -> None:
    """Raises ArtefactError unless projection, controller, menu, healing parts and certificate are of one make."""
    check_assumed(allocator)
    projection, plans = allocator.projection, len(allocator.menu)
    n_features = projection.n_features
    predicted = allocator.controller.predict(np.zeros((1, n_features), dtype=np.float32))
    if predicted.shape != (1, plans) or not np.isfinite(predicted).all():
        raise ArtefactError(
            f"the controller makes {predicted.shape} of {n_features} features, not a number for each of {plans} plans"
        )
    if allocator.healing is not None:
        if allocator.healing.fingerprint != allocator.fingerprint:
            raise ArtefactError(f"its healing parts are of another model, {allocator.healing.fingerprint}")
        for plan in allocator.healing.bridges:
            if plan.n_layers != allocator.menu.n_layers:
                raise ArtefactError(
                    f"its healing parts are for {plan.n_layers} layers, its menu for {allocator.menu.n_layers}"
                )
    known = [point.certificate for point in allocator.others]
    if any((found.plan or 0) >= plans for found in (allocator.certificate, *known)):
        raise ArtefactError(f"its certificates should name one of its {plans} plans, counted from 0, or none")
    if len({*allocator.keeps}) < len(allocator.keeps) or not all(found.price for found in known):
        raise ArtefactError("its further certificates should each have a price, and a level of their own")
    for alarm in (allocator.drift, *(point.drift for point in allocator.others)):
        if alarm is None:
            continue
        scores = alarm.reference_scores
        if scores.shape[1] != 2 or scores[:, 1].max() > 1:
            raise ArtefactError("its drift reference should have 2 channels, distances and budgets up to 1")
    if allocator.outliers is not None and not set(allocator.outliers.projection.sets) <= set(projection.sets):
        read = ", ".join(allocator.outliers.projection.sets)
        raise ArtefactError(f"its outlier test reads {read}, its controller {', '.join(projection.sets)}")
