"""Shards of one run that start in the same moment, on a disk that takes its time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from child import Ended, Limits
from outcome import Outcome, judged
from project import Project
from selection import LONG

STARTS = range(200 if LONG else 3)
SLOW = Limits(sync_seconds=0.03)


@pytest.fixture(scope="session")
def before_labels(base: Path, finished: Project) -> Project:
    """A project that is about to be labelled."""
    folder = base / "before-shards"
    folder.mkdir()
    for name in ("tiny.yaml", "prompts.jsonl", "notes.txt"):
        (folder / name).write_bytes((finished.folder / name).read_bytes())
    project = Project(folder)
    for stage in ("menu", "adapt"):
        ended = project.command(stage, "tiny.yaml")
        assert ended.status == 0, ended.err
    return project


@pytest.mark.parametrize("number", STARTS)
def test_shards_that_start_together(
    finished: Project,
    before_labels: Project,
    tmp_path: Path,
    number: int,
    expect_good: Callable[[Outcome, str], None],
    record_property: Callable[[str, Any], None],
) -> None:
    project = before_labels.copy(tmp_path / "project")
    (project.run / "config.yaml").unlink()  # so that both have to write it
    foreign, ended = project.foreign, {}
    together = threading.Barrier(2)

    def label(shard: str) -> None:
        together.wait()
        ended[shard] = project.command("label", "tiny.yaml", "--shard", shard, limits=SLOW)

    threads = [threading.Thread(target=label, args=(shard,)) for shard in ("1/2", "2/2")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    failed: list[Ended] = [one for one in ended.values() if one.status != 0]
    assert not failed, failed[0].err
    record_property("counted", "pairs of shards started together without a crash")
    if number % 10 == 0:
        rest = project.command("run", "tiny.yaml")
        expect_good(*judged(rest, project, foreign, lambda: None if _same(finished, project) else "other labels"))


def _same(finished: Project, project: Project) -> bool:
    """All scores; how far an answer was generated to know its score depends on the prompts labelled beside it."""
    scores = [{(*row[:5], row[7]) for row in one.content["labels.db"]} for one in (finished, project)]
    return scores[0] == scores[1]
