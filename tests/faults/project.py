"""A finished run on a tiny model as a project folder, made once and copied for each case."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from child import Ended, Limits, command
from content import content_of
from tiny_run import tiny_settings, write_prompts

SMALL_TREES = {
    "sets": ["length", "path", "states"],
    "components": 6,
    "parameters": {"n_trees": 20, "min_leaf_rows": 5},
}
"""With the defaults so few prompts grow no tree."""
NOTES = "What somebody else keeps here.\n"
GENERATE = ("generate", "--allocator", "runs/tiny/allocator")
QUICK_MENU = ("menu", "tiny.yaml", "--set", "menu={method: given, given: ['0-1,5'], probe_depth: 2}")


@dataclass(frozen=True)
class Project:
    """A folder with a configuration, prompts, a run, and files that belong to somebody else."""

    folder: Path

    @property
    def run(self) -> Path:
        return self.folder / "runs" / "tiny"

    @property
    def allocator(self) -> Path:
        return self.run / "allocator"

    @property
    def foreign(self) -> dict[Path, bytes]:
        """The user's own files that no command may change."""
        names = ("tiny.yaml", "prompts.jsonl", "notes.txt", "runs/tiny/notes.txt")
        paths = [self.folder / name for name in names]
        return {path: path.read_bytes() for path in paths if path.is_file() and os.access(path, os.R_OK)}

    @cached_property
    def content(self) -> dict[str, Any]:
        return content_of(self.run)

    def copy(self, folder: Path) -> Project:
        shutil.copytree(self.folder, folder, dirs_exist_ok=True)
        return Project(folder)

    def without_run(self, folder: Path) -> Project:
        """A new project of the same configuration and prompts, in which nothing was done."""
        folder.mkdir()
        for name in ("tiny.yaml", "prompts.jsonl", "notes.txt"):
            shutil.copy(self.folder / name, folder)
        return Project(folder)

    def command(self, *arguments: object, limits: Limits | None = None) -> Ended:
        return command(self.folder, *arguments, limits=limits)


def finished_project(
    folder: Path, model: Path, tracking: Path, controllers: Sequence[str] = ("lightgbm", "mlp")
) -> Project:
    """A new project whose run was finished; copies of it keep logging to the same `tracking` folder."""
    folder.mkdir()
    write_prompts(folder / "prompts.jsonl")
    settings = tiny_settings(Path(), model, Path("prompts.jsonl"))
    given = {"lightgbm": SMALL_TREES} if "lightgbm" in controllers else {}
    tuning = {"search_from": 0, "trials": 1, "components": [6], "folds": 2, "controllers": [*controllers]}
    settings |= {"tuning": {**tuning, "given": given}, "tracking": {"uri": f"sqlite:///{tracking / 'mlflow.db'}"}}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(settings))
    (folder / "notes.txt").write_text(NOTES)
    project = Project(folder)
    ended = project.command("run", "tiny.yaml")
    assert ended.status == 0, ended.out + ended.err
    (project.run / "notes.txt").write_text(NOTES)
    return project
