"""Ctrl-C in every command: one line and status 130, no traceback, nothing swallowed; the same command goes on."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
from child import ROOT, Limits
from outcome import differences
from pressing import Press
from project import Project
from selection import LONG
from test_stage_faults import undone

from backbone.interrupts import INTERRUPTED, LINE

ALLOCATOR = ("--allocator", "runs/tiny/allocator")
MOMENTS = [
    ("check", None, Press("pipelines.run.check:try_judge", place="destructor")),
    ("run", "menu", Press("pipelines.run.model:load_backbone", place="callback")),
    ("run", "label", Press("oracle.labels.store:LabelStore.add", call=2, place="destructor")),
    ("run", "tune", Press("pipelines.stages.settings_search:_objective")),
    ("tune", "tune", Press("pipelines.stages.settings_search:Work.judge", times=2)),
    ("run", "train", Press("controller.models.mlp:MLPController._fit", place="callback", times=2)),
    ("report", None, Press("mlflow:log_params", place="destructor")),
    ("report", None, Press("mlflow:log_artifacts", times=2)),
    ("search", None, Press("oracle.labels.store:LabelStore.add", place="callback")),
    ("generate", None, Press("runtime.offline:_allocated", place="destructor")),
    ("compare", None, Press("runtime.side_by_side:_compared", call=2)),
    ("inspect", None, Press("layerbudget.inspection:_described", place="callback")),
    ("export", None, Press("serving.router.export:export_plan", place="destructor")),
]
"""A command, the stage whose results are gone, and when it is pressed."""
WORDS = {
    "generate": ("generate", *ALLOCATOR, "--prompts", "prompts.jsonl", "--out", "out.jsonl"),
    "compare": ("compare", *ALLOCATOR, "--prompts", "prompts.jsonl", "--out", "out.jsonl"),
    "inspect": ("inspect", "runs/tiny/allocator"),
    "export": ("export", "shorter", *ALLOCATOR, "--plan", "0-4"),
    "search": ("search", "tiny.yaml", "--prompts", "4"),
}
"""Of the other commands, the name and the configuration."""


@pytest.mark.parametrize(("name", "stage", "press"), MOMENTS, ids=lambda value: getattr(value, "function", value))
def test_ctrl_c_is_never_swallowed(project: Project, name: str, stage: str | None, press: Press) -> None:
    if stage is not None:
        undone(project, stage)
    ended = project.command(*WORDS.get(name, (name, "tiny.yaml")), limits=Limits(press=press))
    assert (ended.status, ended.err.count(LINE.decode())) == (INTERRUPTED, 1), ended.out + ended.err
    assert "Traceback" not in ended.err
    assert "Exception ignored" not in ended.err


def test_a_command_goes_on_after_ctrl_c(project: Project, finished: Project) -> None:
    undone(project, "label")
    press = Press("oracle.labels.store:LabelStore.add", call=3, times=2)
    assert project.command("run", "tiny.yaml", limits=Limits(press=press)).status == INTERRUPTED
    assert project.command("run", "tiny.yaml").status == 0
    assert differences(finished, project) is None


IMPORTS = """
import signal, sys
class Pressing:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            sys.meta_path.remove(self)
            signal.raise_signal(signal.SIGINT)
sys.meta_path.insert(0, Pressing())
sys.argv[1:] = {words!r}
from layerbudget.__main__ import main
main()
"""


@pytest.mark.parametrize(
    ("module", "words"), [("layerbudget.cli", ["--version"]), ("torch", ["inspect", "runs/tiny/allocator"])]
)
def test_ctrl_c_during_imports_is_never_swallowed(finished: Project, module: str, words: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS.format(module=module, words=words)],
        cwd=finished.folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        check=False,
    )
    assert (done.returncode, done.stderr) == (INTERRUPTED, LINE)


RANDOM = [(number, double) for number in range(30) for double in (False, True)] if LONG else []


@pytest.mark.parametrize(("number", "double"), RANDOM)
def test_ctrl_c_at_random_moments(
    finished: Project, tmp_path, record_property: Callable[[str, Any], None], number: int, double: bool
) -> None:
    """As on a terminal, which sends it to every process of the command; a third of the runs tunes in two of them."""
    project = finished.copy(tmp_path / "project")
    shutil.rmtree(project.run)
    workers = ["--set", "tuning.workers=2", "--set", "tuning.trials=8"] if number % 3 == 0 else []
    draw = random.Random(f"{number} {double}")
    code = "from backbone.interrupts import install; install(); print('ready', flush=True)\n"
    code += "from layerbudget.__main__ import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "run", "tiny.yaml", *workers],
        cwd=project.folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(draw.random() * 30)
    was_over = process.poll() is not None
    for pause in (0, draw.random()) if double else (0,):
        time.sleep(pause)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)
    pressed = time.monotonic()
    out, err = process.communicate(timeout=300)
    seconds = time.monotonic() - pressed
    assert "Traceback" not in err, err
    assert "Exception ignored" not in err, err
    if was_over or process.returncode == -signal.SIGINT:  # so late that the interpreter had let go of its handlers
        return
    assert (process.returncode, err.count(LINE.decode())) == (INTERRUPTED, 1), out + err
    record_property("counted", f"Ctrl-C, {'twice' if double else 'once'}: 0 tracebacks, 0 swallowed")
    record_property("counted", f"of them ended {'within' if seconds < 8 else 'after'} 8 s")
