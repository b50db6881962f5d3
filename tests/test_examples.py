"""The examples run, on a tiny model."""

import os
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from command import ran
from tiny_allocator import make_allocator

from backbone.loading import load_backbone
from pipelines.config import load_config
from pipelines.run.workspace import Workspace

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def folder(model_folder, tmp_path, monkeypatch) -> str:
    """A saved allocator that knows where its model is."""
    monkeypatch.setenv("LAYERBUDGET_CACHE", str(tmp_path / "cache"))
    model, _ = load_backbone(str(model_folder))
    replace(make_allocator(model), model_source=str(model_folder)).save_pretrained(tmp_path / "allocator")
    return str(tmp_path / "allocator")


def run(name: str):
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]


def test_three_lines(folder, capsys) -> None:
    run("three_lines")(folder, "abcabc")
    assert capsys.readouterr().out.startswith("abcabc")


def test_chat_streams_and_keeps_its_plan(folder, capsys) -> None:
    run("chat")(folder, ["abcd\n", "efghijklmnop\n", "\n", "never read\n"], 5)
    lines = capsys.readouterr().out.splitlines()
    plans = [line for line in lines if line.startswith("[")]
    assert len(plans) == 2, "the empty line ends the chat"
    assert plans[0] == plans[1]
    assert sum(len(line) for line in lines if not line.startswith("[")) > 0


def test_offline_answers_every_line_in_order(folder, tmp_path, capsys) -> None:
    prompts, answers = tmp_path / "prompts.txt", tmp_path / "answers.txt"
    prompts.write_text("abcd\n\nefghijklmnop\nab\n")
    run("offline")(folder, str(prompts), str(answers))
    assert len(answers.read_text().splitlines()) == 3
    assert "more answered" in capsys.readouterr().out


def test_a_slurm_array_labels_in_parts_that_are_merged(config_file, tmp_path, monkeypatch) -> None:
    path = config_file(runs="runs")
    monkeypatch.chdir(tmp_path)
    for stage in ("menu", "adapt"):
        ran(stage, path.name)
    (tmp_path / "layerbudget").write_text(f'#!/bin/sh\nexec {sys.executable} -m layerbudget "$@"\n')
    (tmp_path / "layerbudget").chmod(0o755)
    script = ["bash", str(EXAMPLES / "label_array.sh"), path.name, "tiny"]
    known = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_ARRAY_TASK_COUNT": "2"}
    known["PYTHONPATH"] = os.pathsep.join([str(EXAMPLES.parent), os.environ.get("PYTHONPATH", "")])
    for part in "12":
        subprocess.run(script, env={**known, "SLURM_ARRAY_TASK_ID": part}, check=True, capture_output=True)
    ran("merge", path.name, *(f"runs-{part}/tiny/labels.db" for part in "12"))
    workspace = Workspace(load_config(path))
    assert workspace.labels_digest() is not None, "none is missing, so `run` goes on"
