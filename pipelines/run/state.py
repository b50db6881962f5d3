"""The stages of a run, whose run a folder is, and which of its stages are done.

A stage is done if its inputs and results are the recorded ones. Its key is a hash of the prompts, the model's source,
the configuration that the stage reads, and the results of all stages before it. So a stage that is done again with
another result makes later ones undone; one with the same result does not.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from operator import getitem
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError

from backbone.files import UNFINISHED, write_atomically
from backbone.model_source import PACKAGE_PREFIX
from pipelines.config import Config, ConfigError

if TYPE_CHECKING:
    from pipelines.run.workspace import Workspace

FORMAT_VERSION = 6
"""Raised when a change of code makes the stages' earlier files wrong."""
LOCK = ".lock"


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage.

    Attributes:
        title: what it does.
        reads: the configuration keys that its result depends on.
        follows: the stages whose results it uses.
        files: what it leaves in the run folder.
        notes: files that tell how it went (times, dates); a later stage depends on what else the stage leaves.
    """

    name: str
    title: str
    reads: tuple[str, ...]
    follows: tuple[str, ...]
    files: tuple[str, ...]
    notes: tuple[str, ...] = ()


STAGES = (
    Stage("menu", "find the plans to choose from", ("menu", "decoding"), (), ("menu.json",)),
    Stage(
        "adapt",
        "make the shortened plans better",
        ("adapt", "decoding", "label.batch_size", "menu.method", "menu.plans"),
        ("menu",),
        ("healing.safetensors", "adapt.json"),
        notes=("adapt.json",),
    ),
    Stage(
        "label",
        "answer and judge the prompts under every plan",
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
        ("tuning", "label.tolerance", "calibration.keep", "calibration.risk"),
        ("label", "features"),
        ("tuning.json", "winner.yaml"),
    ),
    Stage("train", "train the controllers", (), ("tune",), ("controllers", "expected_losses.npz")),
    Stage(
        "calibrate",
        "certify a price, labelling what it chooses",
        ("calibration",),
        ("train",),
        ("calibration.json", "allocator"),
    ),
    Stage(
        "evaluate",
        "measure all policies on unseen prompts",
        ("evaluation",),
        ("calibrate",),
        ("metrics.json", "choices.json"),
    ),
    Stage(
        "report",
        "write the report, log the run",
        ("tracking", "name"),
        ("evaluate",),
        ("report.html", "logged.json"),
    ),
)
BY_NAME = {stage.name: stage for stage in STAGES}


def all_before(stage: Stage) -> list[Stage]:
    """The stages that a stage follows, and those that they follow, in order."""
    names = set(stage.follows)
    for name in stage.follows:
        names |= {earlier.name for earlier in all_before(BY_NAME[name])}
    return [candidate for candidate in STAGES if candidate.name in names]


class _Done(BaseModel, strict=True):
    key: str
    files: dict[str, str]
    seconds: float


class _Record(BaseModel, strict=True):
    """What `run.json` holds."""

    config: str
    model: str
    stages: dict[str, _Done]


def read_record(config: Config) -> _Record:
    """The record of a run that the folder belongs to, or the one that it begins with; nothing is written.

    Raises:
        ConfigError: the folder is another run's, or holds somebody's files but no run.
    """
    path, fresh = config.folder / "run.json", _Record(config=_owner(config), model=config.model.source, stages={})
    if not path.exists():
        _check_unused(config)
        return fresh
    try:
        found = _Record.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        raise ConfigError(
            f"{path} is damaged; put {fresh.model_dump_json()} into it, and the stages are done again with the labels "
            "kept"
        ) from None
    for what, theirs, mine in (("config", found.config, fresh.config), ("model", found.model, fresh.model)):
        if theirs != mine:
            raise ConfigError(
                f"{config.folder} belongs to the {what} {theirs}, not {mine}; "
                f"give this run a name of its own, for example --set name={config.name}-2"
            )
    return found


class RunState:
    """`run.json` in the run folder. Reads only, until `begin` or `record`; see `read_record`."""

    def __init__(self, workspace: Workspace) -> None:
        self._workspace, self._config = workspace, workspace.config
        self._record = read_record(self._config)
        self._hashes: dict[str, str | None] = {}

    def begin(self) -> None:
        """Make the folder this run's, before anything else is written there."""
        if not self._workspace.path("run.json").exists():
            self._write()

    def key(self, stage: Stage) -> str:
        """Hash of everything that the stage's result depends on, as far as the stages before it are done."""
        values = self._config.model_dump(mode="json")
        given = self._config.adapt.given if stage.name == "adapt" else None
        parts = {
            "format": FORMAT_VERSION,
            "stage": stage.name,
            "model": [_source_identity(self._config.model.source), self._config.model.dtype, self._config.model.device],
            "prompts": self._workspace.prompts.digest,
            "splits": [values["data"][name] for name in ("shares", "seed")],
            "reads": {key: reduce(getitem, key.split("."), values) for key in stage.reads},
            "before": [self._result(earlier) for earlier in all_before(stage)],
            **({} if given is None else {"given": self._hash(str(Path(given).absolute()))}),
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    def is_done(self, stage: Stage) -> bool:
        """Whether the stage and all before it are done, and their files the ones that they left.

        Raises:
            ConfigError: labels that were recorded have changed.
        """
        return all(self._is_done(earlier) for earlier in [*all_before(stage), stage])

    def _is_done(self, stage: Stage) -> bool:
        entry = self._record.stages.get(stage.name)
        if entry is None or entry.key != self.key(stage):
            return False
        found = {name: self._hash(name) for name in stage.files}
        if stage.name == "label" and None not in found.values() and found != entry.files:
            raise ConfigError(
                f"{self._config.folder / 'labels.db'} no longer holds the labels that this run made; "
                "delete it, and they are made again"
            )
        return found == entry.files

    def _result(self, stage: Stage) -> dict[str, str] | None:
        if (entry := self._record.stages.get(stage.name)) is None:
            return None
        return {name: known for name, known in entry.files.items() if name not in stage.notes}

    def record(self, stage: Stage, seconds: float) -> None:
        """Note that the stage is done, with what it left. Raises ConfigError where something of it is missing."""
        self._hashes.clear()
        files = {name: found for name in stage.files if (found := self._hash(name)) is not None}
        if missing := [name for name in stage.files if name not in files]:
            raise ConfigError(f"the stage {stage.name!r} has ended, but {missing[0]} is missing or not complete")
        self._record.stages[stage.name] = _Done(key=self.key(stage), files=files, seconds=round(seconds, 1))
        self._write()

    def seconds(self) -> dict[str, float]:
        """Computing time of each finished stage, of the run that finished it."""
        return {name: entry.seconds for name, entry in self._record.stages.items()}

    def _hash(self, name: str) -> str | None:
        if name not in self._hashes:
            path, labels = self._workspace.path(name), name == "labels.db"
            self._hashes[name] = self._workspace.labels_digest() if labels else content_hash(path)
        return self._hashes[name]

    def _write(self) -> None:
        write_atomically(self._workspace.path("run.json"), self._record.model_dump_json(indent=2) + "\n")


def stage_key(workspace: Workspace, name: str) -> str:
    """See `RunState.key`."""
    return RunState(workspace).key(BY_NAME[name])


def _owner(config: Config) -> str:
    """The configuration's file as seen from the run's folder: the same when the whole project is moved or copied.

    Raises:
        ConfigError: it lies in the run's folder, where its resolved form would take its place.
    """
    folder = config.folder.resolve()
    if not config.file:
        return ""
    if folder in Path(config.file).parents:
        raise ConfigError(
            f"the configuration {config.file} lies in the folder of its own run, {config.folder}; "
            "keep it elsewhere, or give the run another name"
        )
    return Path(os.path.relpath(config.file, folder)).as_posix()


def _check_unused(config: Config) -> None:
    """A folder without a run may be used if there is nothing in it."""
    if config.folder.exists() and not config.folder.is_dir():
        raise ConfigError(f"{config.folder} should be a run's folder, but is a file; choose another name")
    found = sorted(path.name for path in config.folder.iterdir()) if config.folder.is_dir() else []
    if foreign := [name for name in found if not name.startswith(LOCK) and not name.endswith(UNFINISHED)]:
        raise ConfigError(
            f"{config.folder} holds {foreign[0]!r}, but no run (there is no run.json); choose another name, "
            f"for example --set name={config.name}-2"
        )


def check_own(folder: Path, is_own: Callable[[PurePath], bool]) -> None:
    """Raises ConfigError where somebody keeps a file in a folder that a stage is about to replace.

    Args:
        folder: that is replaced.
        is_own: whether a file, by its path in the folder, is one that the stage writes.
    """
    for path in sorted(folder.rglob("*")):
        if not path.is_dir() and not is_own(path.relative_to(folder)):
            raise ConfigError(f"{path} lies in a folder that a stage replaces, and is none of its files; move it away")


def _source_identity(source: str) -> list[Any]:
    """The source, with names, sizes and times of its files where they are local."""
    path = Path(source).expanduser()
    if source.startswith(PACKAGE_PREFIX) or not path.exists():
        return [source]
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return [source, *([file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files if file.is_file())]


def content_hash(path: Path) -> str | None:
    """SHA-256 of a file or of a folder's files; None where there is nothing."""
    if not path.exists():
        return None
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            digest.update(file.relative_to(path.parent).as_posix().encode() + file.read_bytes())
    return digest.hexdigest()
