"""Each of the nine stages, done again while the machine refuses something; afterwards the same command goes on."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from child import Limits
from outcome import Outcome, differences, judged, lost_labels, may_be_accepted
from project import Project
from selection import selected

RESULTS = {
    "menu": "menu.json",
    "adapt": "healing.safetensors",
    "label": "labels.db",
    "features": "features.parquet",
    "tune": "tuning.json",
    "train": "controllers",
    "calibrate": "allocator",
    "evaluate": "metrics.json",
    "report": "report.html",
}
BEFORE = {"adapt": "menu.json", "label": "healing.safetensors", "features": "menu.json",
          "tune": "features.parquet", "train": "tuning.json", "calibrate": "controllers/mlp/controller.safetensors",
          "evaluate": "allocator/menu.json", "report": "metrics.json"}  # fmt: skip
ALL_STAGES = list(RESULTS)


def undone(project: Project, stage: str) -> None:
    """Without the stage's results, so that it has to write all of them."""
    path = project.run / RESULTS[stage]
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    if stage == "tune":
        (project.run / "tuning.db").unlink()


@pytest.fixture
def expect_to_go_on(finished: Project, expect_good: Callable[[Outcome, str], None]) -> Callable[..., None]:
    """A stage under limits; afterwards no label is gone and, once `repair` was called, the run goes on to its end."""

    def expect(
        project: Project, stage: str, limits: Limits | None = None, repair: Callable[[], Any] = lambda: None
    ) -> None:
        foreign = project.foreign
        ended = project.command(stage, "tiny.yaml", limits=limits)
        repair()
        lost = None if stage == "label" else lost_labels(finished, project)
        outcome, seen = judged(ended, project, foreign, may_be_accepted)
        if not seen:
            again = project.command("run", "tiny.yaml")
            end = differences(finished, project) if again.status == 0 else f"it does not go on: {again.err[-2000:]}"
            if wrong := lost or end:
                outcome, seen = "data lost", f"{wrong}\nafter: {ended.err[-1500:]}"
        expect_good(outcome, seen)

    return expect


@pytest.mark.parametrize("size", selected([1000, 0, 20_000], every=3))
@pytest.mark.parametrize("stage", selected(ALL_STAGES, every=5))
def test_no_file_may_grow(project, stage, size, expect_to_go_on) -> None:
    undone(project, stage)
    expect_to_go_on(project, stage, Limits(file_bytes=size))


@pytest.fixture
def small_disk(finished: Project, tmp_path: Path) -> Iterator[Project]:
    """A copy of the project on a file system of its own with 256 MiB, more than `check` asks for."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256m", "tmpfs", disk], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"this process may not mount a small disk: {mounted.stderr.strip()}")
    try:
        yield finished.copy(disk / "project")
    finally:
        subprocess.run(["umount", disk], check=True)


def _fill(path: Path, left: int) -> None:
    """Takes all the space of a disk but so many bytes."""
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass
    os.truncate(path, max(0, path.stat().st_size - left))


@pytest.mark.parametrize("left", selected([8192, 0, 65536], every=3))
@pytest.mark.parametrize("stage", selected(ALL_STAGES, every=5))
def test_the_disk_is_full(small_disk, stage, left, expect_to_go_on) -> None:
    undone(small_disk, stage)
    filler = small_disk.folder.parent / "filler"
    _fill(filler, left)
    expect_to_go_on(small_disk, stage, repair=filler.unlink)


def _modes(folder: Path, writable: bool) -> None:
    for path in [folder, *folder.rglob("*")]:
        mode = path.stat().st_mode
        path.chmod(mode | stat.S_IWUSR if writable else mode & ~(stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH))


@pytest.mark.parametrize("stage", selected(ALL_STAGES, every=5))
def test_the_run_folder_is_read_only(project, limits, stage, expect_to_go_on) -> None:
    undone(project, stage)
    _modes(project.run, writable=False)
    expect_to_go_on(project, stage, limits, repair=lambda: _modes(project.run, writable=True))


def test_a_finished_run_answers_from_a_read_only_folder(project, limits) -> None:
    _modes(project.run, writable=False)
    ended = project.command("run", "tiny.yaml", limits=limits)
    assert ended.status == 0, ended.err
    assert ended.out.count("done before") == 9
    _modes(project.run, writable=True)


@pytest.mark.parametrize("stage", selected(ALL_STAGES, every=5))
def test_a_result_of_an_earlier_stage_is_gone(project, stage, expect_to_go_on) -> None:
    gone = project.run / BEFORE[stage] if stage in BEFORE else project.folder / "prompts.jsonl"
    kept = gone.read_bytes()
    gone.unlink()
    expect_to_go_on(project, stage, repair=lambda: gone.write_bytes(kept))


@pytest.mark.parametrize("stage", selected(ALL_STAGES, every=5))
def test_something_else_lies_where_the_result_belongs(project, stage, expect_good) -> None:
    """A folder of somebody's where a file belongs, a file of somebody's where a folder belongs."""
    path = project.run / RESULTS[stage]
    was_folder = path.is_dir()
    undone(project, stage)
    if not was_folder:
        path.mkdir()
    theirs = path if was_folder else path / "notes.txt"
    theirs.write_text("Somebody's notes.\n")

    foreign = {**project.foreign, theirs: theirs.read_bytes()}
    ended = project.command(stage, "tiny.yaml")
    expect_good(*judged(ended, project, foreign, may_be_accepted))
