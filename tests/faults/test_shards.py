"""Shards of one run that start in the same moment, on a disk that takes its time."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from child import Ended, Limits
from outcome import judged
from project import Project
from selection import LONG

STARTS = range(200 if LONG else 3)
SLOW = Limits(sync_seconds=0.03)


@pytest.fixture(scope="session")
def before_labels(base: Path, finished: Project) -> Project:
    """A project that is about to be labelled."""
    project = finished.without_run(base / "before-shards")
    for stage in ("menu", "adapt"):
        ended = project.command(stage, "tiny.yaml")
        assert ended.status == 0, ended.err
    return project


@pytest.mark.parametrize("number", STARTS)
def test_shards_that_start_together(finished, before_labels, tmp_path, number, expect_good, record_property) -> None:
    project = before_labels.copy(tmp_path / "project")
    (project.run / "config.yaml").unlink()  # so that both have to write it
    foreign, together = project.foreign, threading.Barrier(2)

    def label(shard: str) -> Ended:
        together.wait()
        return project.command("label", "tiny.yaml", "--shard", shard, limits=SLOW)

    with ThreadPoolExecutor(2) as threads:
        failed = [ended.err for ended in threads.map(label, ("1/2", "2/2")) if ended.status != 0]
    assert not failed, failed[0]
    record_property("counted", "pairs of shards started together without a crash")
    if number % 10 == 0:
        rest = project.command("run", "tiny.yaml")
        expect_good(*judged(rest, project, foreign, lambda _: None if _same(finished, project) else "other labels"))


def _same(finished: Project, project: Project) -> bool:
    """All scores; how far an answer was generated to know its score depends on the prompts labelled beside it."""
    scores = [{(*row[:5], row[7]) for row in one.content["labels.db"]} for one in (finished, project)]
    return scores[0] == scores[1]
