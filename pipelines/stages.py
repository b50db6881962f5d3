"""What each stage of a run depends on, and whether it has to be done again.

A stage's key is a hash of the configuration it reads, of the prompts and the model's source, and of the keys of the
stages before it. A stage is done if the run folder records that key and its files are still the ones it wrote.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backbone.loading import PACKAGE_PREFIX
from pipelines.config import Config, ConfigError
from pipelines.workspace import Workspace

FORMAT_VERSION = 3
"""Raised when a change of code makes the stages' earlier files wrong."""


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage: the configuration keys it reads, the stages it follows, and the files it leaves in the run folder.

    Files that grow while they are used (databases) are only required to exist.
    """

    name: str
    title: str
    reads: tuple[str, ...]
    follows: tuple[str, ...]
    files: tuple[str, ...]


STAGES: tuple[Stage, ...] = (
    Stage("menu", "find the plans to choose from", ("menu", "decoding"), (), ("menu.json",)),
    Stage(
        "adapt",
        "make the shortened plans better",
        ("adapt", "label.batch_size"),
        ("menu",),
        ("stand_ins.safetensors", "adapt.json"),
    ),
    Stage(
        "label",
        "answer and judge every prompt under every plan",
        ("label.batch_size", "label.limit"),
        ("adapt",),
        ("labels.db",),
    ),
    Stage(
        "features",
        "read the first layers' states of every prompt",
        ("features", "label.limit"),
        ("menu",),
        ("features.parquet",),
    ),
    Stage(
        "tune",
        "search each controller's settings",
        ("tuning", "label.tolerance", "calibration.alpha", "calibration.risk"),
        ("label", "features"),
        ("tuning.json", "winner.yaml"),
    ),
    Stage("train", "train the controllers", (), ("tune",), ("controllers",)),
    Stage("calibrate", "certify a price", ("calibration",), ("train",), ("calibration.json", "allocator")),
    Stage(
        "evaluate",
        "measure all policies on unseen prompts",
        ("evaluation",),
        ("calibrate",),
        ("metrics.json", "choices.json"),
    ),
    Stage("report", "write the report, log the run", ("tracking", "name"), ("evaluate",), ("report.html",)),
)
BY_NAME = {stage.name: stage for stage in STAGES}


def stage_key(config: Config, stage: Stage) -> str:
    """Hash of everything that the stage's result depends on."""
    values = config.model_dump(mode="json")
    parts: dict[str, Any] = {"format": FORMAT_VERSION, "stage": stage.name}
    parts["reads"] = {key: _value(values, key) for key in stage.reads}
    parts["follows"] = [stage_key(config, BY_NAME[name]) for name in stage.follows]
    if not stage.follows:
        parts["model"] = [_source_identity(config.model.source), config.model.dtype, config.model.device]
        parts["prompts"] = Workspace.of(config).prompts_hash
        parts["shares"] = values["data"]["shares"]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _value(values: dict[str, Any], key: str) -> Any:
    for part in key.split("."):
        values = values[part]
    return values


def _source_identity(source: str) -> list[Any]:
    """The source, with names, sizes and times of its files where they are local."""
    path = Path(source).expanduser()
    if source.startswith(PACKAGE_PREFIX) or not path.exists():
        return [source]
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return [source, *([file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files if file.is_file())]


class RunState:
    """`run.json` in the run folder: whose run it is, and which stages were finished with which key."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._path = config.folder / "run.json"
        self._data: dict[str, Any] = {"config": config.file, "model": config.model.source, "stages": {}}
        if self._path.exists():
            self._data = self._read()
        self._check_owner()

    def _read(self) -> dict[str, Any]:
        try:
            data: dict[str, Any] = json.loads(self._path.read_text())
            return {name: data[name] for name in self._data}
        except (ValueError, KeyError, TypeError):
            raise ConfigError(
                f"{self._path} is damaged; delete it, and the stages are done again with the labels kept"
            ) from None

    def _check_owner(self) -> None:
        for what, mine in (("config", self._config.file), ("model", self._config.model.source)):
            if (theirs := self._data[what]) != mine:
                raise ConfigError(
                    f"{self._config.folder} belongs to the {what} {theirs}, not {mine}; "
                    f"give this run a name of its own, for example --set name={self._config.name}-2"
                )

    def is_done(self, stage: Stage) -> bool:
        entry = self._data["stages"].get(stage.name)
        if entry is None or entry["key"] != stage_key(self._config, stage):
            return False
        return all(content_hash(self._config.folder / name) == known for name, known in entry["files"].items())

    def record(self, stage: Stage, seconds: float) -> None:
        files = {name: content_hash(self._config.folder / name) for name in stage.files}
        entry = {"key": stage_key(self._config, stage), "files": files, "seconds": round(seconds, 1)}
        self._data["stages"][stage.name] = entry
        write_atomically(self._path, json.dumps(self._data, indent=2) + "\n")

    def seconds(self) -> dict[str, float]:
        """Computing time of each finished stage, of the run that finished it."""
        return {name: entry["seconds"] for name, entry in self._data["stages"].items()}


def content_hash(path: Path) -> str | None:
    """SHA-256 of a file or of a folder's files; "exists" for a database; None where there is nothing."""
    if not path.exists():
        return None
    if path.suffix == ".db":
        return "exists"
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            digest.update(file.relative_to(path.parent).as_posix().encode() + file.read_bytes())
    return digest.hexdigest()


def write_atomically(path: Path, text: str) -> None:
    """Replace a file by new text; a kill at any moment leaves the old or the new one."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    with unfinished.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)
