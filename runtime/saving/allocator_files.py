"""An allocator as files in a folder: what they are, and that they belong together."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Container
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from itertools import count, takewhile
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from backbone.errors import ArtefactError, InputError, reason_of
from backbone.healing.healing import Healing
from backbone.model_source import PACKAGE_PREFIX, check_package
from backbone.plan import PlanMenu
from backbone.strict_json import parse
from controller.base import CONTROLLERS, LossRange
from controller.certificate.certificate import Certificate
from controller.certificate.drift import DriftAlarm
from controller.certificate.outliers import OutlierTest
from controller.features import Projection
from oracle.decoding import Decoding
from runtime.chat_format import ChatFormat
from runtime.parts import AllocatorParts, OperatingPoint
from runtime.saving.allocator_checks import (
    ACCEPTANCE,
    CERTIFICATE,
    FORMAT_VERSION,
    LARGEST_PART,
    MENU,
    OLD_HEALING,
    OPTIONAL,
    PROJECTION,
    chat_hash,
    check_assumed,
    check_entries,
    check_together,
    files_of_other,
)
from runtime.saving.file_bundle import CARD, Manifest, digest_of, file_hash, read_bundle, save_bundle

Parts = TypeVar("Parts", bound=AllocatorParts)
LOADERS: dict[str, Callable[[Path], Any]] = {
    "healing": Healing.load,
    "drift": DriftAlarm.load,
    "outliers": OutlierTest.load,
    "chat": ChatFormat.load,
}


def save_allocator(allocator: AllocatorParts, folder: Path) -> None:
    """See `Allocator.save_pretrained`."""

    def write(scratch: Path) -> Manifest:
        check_assumed(allocator)
        write_files(allocator, scratch)
        return {
            "format_version": FORMAT_VERSION,
            "layerbudget_version": version("layerbudget"),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "model": {"fingerprint": allocator.fingerprint, "source": allocator.model_source},
            "controller": allocator.controller_name,
            "decoding": allocator.decoding.to_dict(),
            "chat_template": chat_hash(allocator),
        }

    save_bundle(folder, write)


def load_allocator(
    kind: type[Parts],
    source: str | Path,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    subfolder: str = "",
) -> Parts:
    """See `Allocator.from_pretrained`; `kind` is what is made of the parts."""
    inside = Path(subfolder)
    if inside.is_absolute() or ".." in inside.parts:
        raise ArtefactError(f"the subfolder {subfolder!r} lies outside of {source}; give one that lies inside")
    folder = Path(source).expanduser()
    if str(source).startswith(PACKAGE_PREFIX):
        folder = _folder_of_package(str(source).removeprefix(PACKAGE_PREFIX))
    if not folder.is_dir():
        files = f"{inside.as_posix()}/*" if inside.parts else None
        folder = _downloaded(str(source), revision=revision, token=token, cache_dir=cache_dir, allow_patterns=files)
    elif revision is not None:
        raise ArtefactError(
            f"revision {revision!r} was asked for, but {source} is a local folder, which has none; leave it out"
        )
    folder /= inside
    try:
        return read_bundle(folder, lambda place, manifest: _loaded(kind, folder, place, manifest))
    except ArtefactError:
        raise
    except InputError as error:
        raise ArtefactError(str(error)) from None


def run_folder(folder: str) -> Path:
    """The folder of the run that a saved allocator lies in."""
    return Path(folder).expanduser().absolute().parent


def _folder_of_package(name: str) -> Path:
    """Raises ArtefactError for a package that is not installed, or brings no allocator."""
    try:
        check_package(name)
    except InputError as error:
        raise ArtefactError(str(error)) from None
    spec = find_spec(name)
    folder = Path(spec.origin if spec and spec.origin else name).parent / "allocator"
    if not folder.is_dir():
        raise ArtefactError(f"the package {name!r} brings no allocator; name one with a folder `allocator`")
    return folder


def content_digest(allocator: AllocatorParts) -> str:
    """A name for all that decides how an allocator answers, equal for equal content, wherever it came from."""
    with tempfile.TemporaryDirectory() as scratch:
        write_files(allocator, Path(scratch))
        hashes = [f"{path.name} {file_hash(path)}" for path in sorted(Path(scratch).iterdir())]
    return digest_of({"files": hashes, "decoding": allocator.decoding.to_dict(), "model": allocator.fingerprint})


def upload_allocator(allocator: AllocatorParts, repo_id: str, private: bool | None, token: str | None) -> str:
    """See `Allocator.push_to_hub`."""
    api = HfApi(token=token)
    url = api.create_repo(repo_id, private=private, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        save_allocator(allocator, Path(scratch) / "allocator")
        api.upload_folder(
            repo_id=url.repo_id, folder_path=Path(scratch) / "allocator", commit_message="Upload allocator"
        )
    return str(url)


def write_files(allocator: AllocatorParts, folder: Path) -> None:
    """All files but the manifest."""
    allocator.menu.save(folder / MENU)
    allocator.projection.save(folder / PROJECTION)
    allocator.certificate.save(folder / CERTIFICATE)
    allocator.controller.save(folder)
    for name, file in OPTIONAL.items():
        if (part := getattr(allocator, name)) is not None:
            part.save(folder / file)
    for number, point in enumerate(allocator.others, 1):
        certificate, drift = files_of_other(number)
        point.certificate.save(folder / certificate)
        if point.drift is not None:
            point.drift.save(folder / drift)
    if allocator.acceptance is not None:
        rates = dict(zip(map(str, allocator.menu.plans), allocator.acceptance, strict=True))
        (folder / ACCEPTANCE).write_text(json.dumps(rates, indent=2) + "\n", encoding="utf-8")
    (folder / CARD).write_text(_model_card(allocator), encoding="utf-8")


def _loaded(kind: type[Parts], folder: Path, place: Path, manifest: Manifest) -> Parts:
    """The allocator whose files lie in `place`, under the name `folder`."""
    check_entries(folder, manifest)
    name, files = manifest["controller"], manifest["files"]
    optional = {**OPTIONAL, "healing": OLD_HEALING} if OLD_HEALING in files else OPTIONAL
    try:
        for file in files.keys() - {optional["healing"]}:
            if (size := (place / file).stat().st_size) > LARGEST_PART:
                raise ArtefactError(f"{file} has {size} bytes; such a file has at most {LARGEST_PART}")
        menu, certificate = PlanMenu.load(place / MENU), Certificate.load(place / CERTIFICATE)
        controller = CONTROLLERS[name].load(place)
        if controller.loss_range is None:  # of before controllers predicted losses
            controller.loss_range = LossRange(-1.0 if certificate.risk == "mean_score" else 0.0)
        allocator = kind(
            menu=menu,
            controller=controller,
            controller_name=name,
            projection=Projection.load(place / PROJECTION),
            certificate=certificate,
            decoding=Decoding.from_dict(manifest["decoding"]),
            fingerprint=manifest["model"]["fingerprint"],
            model_source=manifest["model"]["source"],
            others=_others(place, files),
            acceptance=_acceptance(place / ACCEPTANCE, menu) if ACCEPTANCE in files else None,
            **{part: LOADERS[part](place / file) for part, file in optional.items() if file in files},
        )
        check_together(allocator)
        if (found := chat_hash(allocator)) != (said := manifest["chat_template"]):
            raise ArtefactError(f"its chat template is {found}, manifest.json says {said!r:.80}")
    except Exception as error:  # files that fit their SHA-256 were made by somebody else, and may hold anything
        raise ArtefactError(f"{folder} is damaged: {' '.join(str(error).split()) or type(error).__name__}") from error
    return allocator


def _others(place: Path, files: Container[str]) -> tuple[OperatingPoint, ...]:
    """The further certified points, of those numbers that follow each other."""
    names = takewhile(lambda pair: pair[0] in files, map(files_of_other, count(1)))
    return tuple(
        OperatingPoint(
            Certificate.load(place / certificate), DriftAlarm.load(place / drift) if drift in files else None
        )
        for certificate, drift in names
    )


def _acceptance(path: Path, menu: PlanMenu) -> tuple[float, ...]:
    """Raises ArtefactError for a file that holds other than a share for each plan of the menu."""
    rates = parse(path.read_text(encoding="utf-8"))
    names = [str(plan) for plan in menu.plans]
    if not isinstance(rates, dict) or rates.keys() != {*names}:
        raise ArtefactError(f"{path.name} should hold a rate for each plan of the menu, got {rates!r:.80}")
    for rate in rates.values():
        if type(rate) not in (int, float) or not 0 <= rate <= 1:
            raise ArtefactError(f"a rate of {path.name} is a share from 0 to 1, got {rate!r:.80}")
    return tuple(float(rates[name]) for name in names)


def _downloaded(repo_id: str, **options: Any) -> Path:
    try:
        return Path(snapshot_download(repo_id, **options))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = reason_of(error)
        raise ArtefactError(
            f"no allocator {repo_id!r}: it is neither a folder nor a hub repository ({reason})"
        ) from None


def _model_card(allocator: AllocatorParts) -> str:
    plans = "\n".join(
        f"| {budget:.1%} | {plan.layers:g} | `{plan}` |"
        for plan, budget in zip(allocator.menu.plans, allocator.menu.budgets, strict=True)
    )
    others = "".join(
        f"\nWith `keep={each.certificate.keep:g}`: {each.certificate.sentence}\n" for each in allocator.others
    )
    return f"""---
library_name: layerbudget
tags: [layerbudget, dynamic-depth]
---
# Layer allocator for {allocator.model_source}

Chooses for each prompt which layers of the model run. Controller: {allocator.controller_name}.

{allocator.certificate.sentence}
{others}
```python
from layerbudget import Allocator, load_backbone

model, tokenizer = load_backbone({allocator.model_source!r})
allocator = Allocator.from_pretrained("this folder or repository")
inputs = allocator.inputs(tokenizer, ["..."])
output = allocator.generate(model, **inputs, max_new_tokens=32)
```

| budget | layers | plan |
| --- | --- | --- |
{plans}
"""
