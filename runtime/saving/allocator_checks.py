"""Whether the files of a saved allocator say what they may, and belong together."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from backbone.strict_json import LONGEST_NAME
from controller.base import CONTROLLERS
from controller.certificate.certificate import Certificate
from oracle.chat import NO_TEMPLATE
from runtime.parts import AllocatorParts
from runtime.saving.file_bundle import CARD, BundleError, Manifest

FORMAT_VERSION = 8
LONGEST_SOURCE = 4096
"""Characters of where the model came from, which may be a path."""
LARGEST_PART = 2**30
"""Bytes of every file that is loaded as a whole; healing parts are as large as the model asks for."""
HEALING, DRIFT, OUTLIERS = "healing.safetensors", "drift.safetensors", "outliers.safetensors"
OLD_HEALING = "stand_ins.safetensors"
"""What the file of the healing was called before; still read."""
ACCEPTANCE, CHAT = "acceptance.json", "chat.json"
MENU, PROJECTION, CERTIFICATE = "menu.json", "projection.safetensors", "certificate.json"
ENTRIES: dict[str, type] = {
    "layerbudget_version": str,
    "created": str,
    "model": dict,
    "controller": str,
    "decoding": dict,
    "chat_template": str,
    "files": dict,
}


class ArtefactError(BundleError):
    """A folder that holds no allocator, or a damaged one."""


def optional_parts(allocator: AllocatorParts) -> tuple[str, ...]:
    """The files of those parts that an allocator may do without, as far as it has them."""
    parts = {
        HEALING: allocator.healing,
        DRIFT: allocator.drift,
        OUTLIERS: allocator.outliers,
        CHAT: allocator.chat,
    }
    return tuple(name for name, part in parts.items() if part is not None)


def files_of_other(number: int) -> tuple[str, str]:
    """Certificate and drift reference of a certified point beside the one that is served, counted from 1."""
    return f"certificate-{number}.json", f"drift-{number}.safetensors"


def chat_hash(allocator: AllocatorParts) -> str:
    """Names the chat template; `none` where prompts are given as they are."""
    return NO_TEMPLATE if allocator.chat is None else allocator.chat.hash


def check_entries(folder: Path, manifest: Manifest) -> None:
    if (found := manifest.get("format_version")) != FORMAT_VERSION:
        raise ArtefactError(
            f"{folder} has allocator format {found!r}, this version reads {FORMAT_VERSION}; make it again with "
            "`layerbudget run`"
        )
    for name, kind in ENTRIES.items():
        if not isinstance(manifest.get(name), kind):
            raise ArtefactError(f"{folder} is damaged: {name} in manifest.json should be a {kind.__name__}")
        _check_length(folder, name, manifest[name], LONGEST_NAME)
    for name in ("fingerprint", "source"):
        if not isinstance(manifest["model"].get(name), str):
            raise ArtefactError(f"{folder} is damaged: the model's {name} in manifest.json should be a str")
        _check_length(folder, name, manifest["model"][name], LONGEST_SOURCE if name == "source" else LONGEST_NAME)
    if (controller := manifest["controller"]) not in CONTROLLERS:
        raise ArtefactError(
            f"{folder} needs the controller {controller!r:.80}, known are {', '.join(CONTROLLERS)}; install the "
            "package that brings it"
        )
    needed = {MENU, PROJECTION, CERTIFICATE, CARD, *CONTROLLERS[controller].FILES}
    if missing := needed - manifest["files"].keys():
        raise ArtefactError(f"{folder} is damaged: manifest.json does not list {min(missing)}")


def _check_length(folder: Path, name: str, value: object, longest: int) -> None:
    if isinstance(value, str) and len(value) > longest:
        raise ArtefactError(
            f"{folder} is damaged: {name} in manifest.json has {len(value)} characters, at most {longest} are read"
        )


def check_assumed(allocator: AllocatorParts) -> None:
    """Raises ArtefactError where the certificate was made with something that the allocator has not."""
    chat = chat_hash(allocator)
    for certificate in (allocator.certificate, *(point.certificate for point in allocator.others)):
        if missing := sorted({*_assumed(certificate)} - {*optional_parts(allocator)}):
            raise ArtefactError(f"its certificate was made with {missing[0]}, which this allocator is without")
        if certificate.chat_template not in ("", chat):
            raise ArtefactError(f"its certificate is for the chat template {certificate.chat_template}, it has {chat}")
        if certificate.decoding not in ("", decoding := str(allocator.decoding)):
            raise ArtefactError(
                f"its certificate is for answers by {certificate.decoding!r:.120}, it has {decoding!r:.120}"
            )


def _assumed(certificate: Certificate) -> list[str]:
    return [HEALING if name == OLD_HEALING else name for name in certificate.assumes]


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
