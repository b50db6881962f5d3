"""An allocator as a folder: a manifest with the SHA-256 of every file, checked before anything reads those files."""

from __future__ import annotations

import hashlib
import json
import tempfile
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from backbone.errors import InputError
from backbone.plan import PlanMenu
from backbone.stand_ins import StandIns
from controller.base import CONTROLLERS, controller_class
from controller.certificate import Certificate
from controller.drift import DriftAlarm
from controller.projection import Projection
from oracle.decoding import Decoding
from runtime.allocator import Allocator

FORMAT_VERSION = 2
STAND_INS, DRIFT = "stand_ins.safetensors", "drift.safetensors"


class ArtefactError(InputError):
    """A folder that holds no allocator, or a damaged one."""


def save_allocator(allocator: Allocator, folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        fresh = Path(scratch) / "fresh"
        fresh.mkdir()
        _write(allocator, fresh)
        if folder.exists():
            folder.rename(Path(scratch) / "replaced")
        fresh.rename(folder)


def load_allocator(source: str | Path, revision: str | None) -> Allocator:
    folder = Path(source).expanduser()
    if not folder.is_dir():
        folder = _downloaded(str(source), revision)
    manifest = _checked_manifest(folder)
    name = manifest["controller"]
    if name not in CONTROLLERS:
        raise ArtefactError(f"{folder} needs the controller {name!r}; known are {', '.join(CONTROLLERS)}")
    return Allocator(
        menu=PlanMenu.load(folder / "menu.json"),
        controller=controller_class(name).load(folder),
        controller_name=name,
        projection=Projection.load(folder / "projection.safetensors"),
        certificate=Certificate.load(folder / "certificate.json"),
        decoding=Decoding(manifest["decoding"]["max_new_tokens"], tuple(manifest["decoding"]["stop"])),
        fingerprint=manifest["model"]["fingerprint"],
        model_source=manifest["model"]["source"],
        stand_ins=StandIns.load(folder / STAND_INS) if STAND_INS in manifest["files"] else None,
        drift=DriftAlarm.load(folder / DRIFT) if DRIFT in manifest["files"] else None,
    )


def upload_allocator(allocator: Allocator, repo_id: str, private: bool | None, token: str | None) -> str:
    api = HfApi(token=token)
    url = api.create_repo(repo_id, private=private, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        save_allocator(allocator, Path(scratch) / "allocator")
        api.upload_folder(
            repo_id=url.repo_id, folder_path=Path(scratch) / "allocator", commit_message="Upload allocator"
        )
    return str(url)


def _write(allocator: Allocator, folder: Path) -> None:
    allocator.menu.save(folder / "menu.json")
    allocator.projection.save(folder / "projection.safetensors")
    allocator.certificate.save(folder / "certificate.json")
    allocator.controller.save(folder)
    if allocator.stand_ins is not None:
        allocator.stand_ins.save(folder / STAND_INS)
    if allocator.drift is not None:
        allocator.drift.save(folder / DRIFT)
    (folder / "README.md").write_text(_model_card(allocator))
    manifest = {
        "format_version": FORMAT_VERSION,
        "layerbudget_version": version("layerbudget"),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": {"fingerprint": allocator.fingerprint, "source": allocator.model_source},
        "controller": allocator.controller_name,
        "decoding": asdict(allocator.decoding),
        "files": {path.name: _sha256(path) for path in sorted(folder.iterdir())},
    }
    (folder / "manifest.json").write_text(json.dumps({**manifest, "digest": _digest(manifest)}, indent=2) + "\n")


def _checked_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, after every file it lists was found to be the one that was saved."""
    path = folder / "manifest.json"
    if not path.is_file():
        raise ArtefactError(f"{folder} holds no allocator: there is no manifest.json")
    try:
        manifest: dict[str, Any] = json.loads(path.read_text())
        digest = manifest.pop("digest")
    except (ValueError, KeyError, AttributeError):
        raise ArtefactError(f"{path} is damaged: it is not the manifest that was saved") from None
    if digest != _digest(manifest):
        raise ArtefactError(f"{path} is damaged: its content does not match its digest")
    if manifest["format_version"] != FORMAT_VERSION:
        raise ArtefactError(
            f"{folder} has allocator format {manifest['format_version']}, this version reads {FORMAT_VERSION}"
        )
    for name, expected in manifest["files"].items():
        if not (folder / name).is_file():
            raise ArtefactError(f"{folder} is damaged: {name} is missing")
        if _sha256(folder / name) != expected:
            raise ArtefactError(f"{folder} is damaged: {name} does not match its SHA-256 in manifest.json")
    return manifest


def _downloaded(repo_id: str, revision: str | None) -> Path:
    try:
        return Path(snapshot_download(repo_id, revision=revision))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ArtefactError(
            f"no allocator {repo_id!r}: it is neither a folder nor a hub repository ({reason})"
        ) from None


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _model_card(allocator: Allocator) -> str:
    plans = "\n".join(
        f"| {budget:.1%} | {plan.layers:g} | `{plan}` |"
        for plan, budget in zip(allocator.menu.plans, allocator.menu.budgets, strict=True)
    )
    return f"""---
library_name: layerbudget
tags: [layerbudget, dynamic-depth]
---
# Layer allocator for {allocator.model_source}

Chooses for each prompt which layers of the model run. Controller: {allocator.controller_name}.

{allocator.certificate.sentence}

```python
from layerbudget import Allocator, load_backbone

model, tokenizer = load_backbone({allocator.model_source!r})
allocator = Allocator.from_pretrained("this folder or repository")
inputs = tokenizer(["..."], return_tensors="pt")
output = allocator.generate(model, **inputs, max_new_tokens=32)
```

| budget | layers | plan |
| --- | --- | --- |
{plans}
"""
