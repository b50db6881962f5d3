"""A run that is killed at any moment of any stage, and started again, ends as if nothing had happened."""

from __future__ import annotations

import json
import random
import signal
from pathlib import Path

import pytest
from child import Limits
from outcome import differences
from project import Project
from selection import LONG

from pipelines.run.state import STAGES

NAMES = [stage.name for stage in STAGES]
KILLS = [(name, number) for name in NAMES for number in range(23)] if LONG else [(name, 0) for name in NAMES[::3]]
"""207 in the long table, 23 a stage; else one in three of the stages."""


@pytest.fixture(scope="session")
def stages(base: Path, finished: Project) -> dict[str, Project]:
    """By stage, a project in which all stages before it are done and nothing else has happened."""
    found, last = {}, finished.without_run(base / "before-all")
    for name in NAMES:
        found[name] = last.copy(base / f"before-{name}")
        last = last.copy(base / f"after-{name}")
        ended = last.command(name, "tiny.yaml")
        assert ended.status == 0, ended.out + ended.err
    assert differences(finished, last) is None
    return found


@pytest.mark.parametrize(("stage", "number"), KILLS)
def test_a_killed_stage_goes_on(finished, stages, tmp_path, stage, number, attempt, record_property) -> None:
    project = stages[stage].copy(tmp_path / "project")
    seconds = json.loads((finished.run / "run.json").read_text())["stages"][stage]["seconds"] + 0.15
    delay = random.Random(f"{stage} {number}").random() * seconds
    limits = Limits(interrupt_at=f"{stage}: ", interrupt_after=delay, interrupt_with=signal.SIGKILL)
    killed = project.command("run", "tiny.yaml", limits=limits)
    assert killed.status in (-signal.SIGKILL, 0), killed.err  # or it was over before
    if killed.status:
        record_property("counted", f"SIGKILLs in or after {stage}")
    attempt(project, "run", "tiny.yaml", check=lambda ended: differences(finished, project))
    assert not [path.name for path in project.run.iterdir() if path.name.startswith(".controllers")]
