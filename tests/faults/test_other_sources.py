"""Prompts from a data set, a damaged model, and an output that takes no more."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from child import ROOT
from damage import TEXT, content, damages_of
from outcome import answers_as, differences, may_be_accepted, must_be_refused
from project import GENERATE, QUICK_MENU, Project
from selection import selected


def _table(project: Project) -> Path:
    """The prompts as a folder with a CSV file, which `datasets` loads."""
    folder = project.folder / "table"
    folder.mkdir()
    rows = [json.loads(line) for line in (project.folder / "prompts.jsonl").read_text().splitlines()]
    with (folder / "train.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows({**row, "reference": "x"} for row in rows)
    return folder / "train.csv"


def _second_line(text: str) -> Callable[[bytes], bytes]:
    return lambda old: old.replace(b"\n", f"\n{text}\n".encode(), 1)


LINES = {
    "an empty prompt": "id-x,long,,x,agreement",
    "no judge": "id-x,long,abc,x,",
    "too few columns": "id-x,long",
    "too many columns": "id-x,long,abc,x,agreement,more",
    "an open quote": 'id-x,long,"abc,x,agreement',
    "U+2028": "id-x,long,ab\u2028cd,x,agreement",
}
TABLES = {
    **damages_of("table.csv"),
    "not UTF-8": TEXT["not UTF-8"],
    **{name: content(_second_line(line)) for name, line in LINES.items()},
    "another header": content(lambda old: old.replace(b"prompt", b"question", 1)),
}
NO_TABLE = {*LINES, "another header", "missing", "empty", "zeros"} - {"U+2028", "too many columns"}


@pytest.mark.parametrize("name", selected(list(TABLES), every=12))
def test_a_damaged_table_of_prompts(project, attempt, name) -> None:
    TABLES[name](_table(project))
    check = must_be_refused if name in NO_TABLE else may_be_accepted
    attempt(project, *QUICK_MENU, "--set", "name=new", "--set", "data.path=table", check=check)


WEIGHTS = "model.safetensors"
MODEL_FILES = ("config.json", "generation_config.json", WEIGHTS, "tokenizer.json", "tokenizer_config.json")
OF_MODELS = [
    (name, damage) for name in MODEL_FILES for damage in damages_of(name) if (name, damage[:4]) != (WEIGHTS, "bits")
]
"""A flipped bit of a weight is seen only where the fingerprint reads it: the format has no checksum."""


@pytest.mark.parametrize(("name", "damage"), selected(OF_MODELS, every=30))
def test_a_damaged_model(project, base, answers, attempt, name, damage) -> None:
    """A finished run knows its model; what is damaged is refused, or makes no difference to any result."""
    model = shutil.copytree(base / "model", project.folder / "model")
    damages_of(name)[damage](model / name)
    attempt(project, *GENERATE, "--model", model, "abcabc", check=answers_as(answers["finished"]))


@pytest.mark.parametrize(
    "setting",
    ["tracking.uri=sqlite:////dev/full/x.db", "tracking.uri=sqlite:///notes.txt", "tracking.experiment=' '",
     "tuning.storage=sqlite:///notes.txt", "tuning.storage=sqlite:////dev/full/x.db"],
)  # fmt: skip
def test_stores_that_are_none(project, finished, setting, attempt) -> None:
    attempt(project, "run", "tiny.yaml", "--set", setting, check=lambda ended: differences(finished, project))


ODD_WORDS = {
    "a byte that is not UTF-8": ("ab\udcffcd",),
    "half a character": ("ab\ud800",),
    "no prompt": ("",),
    "a prompt longer than the model takes": ("a" * 300,),
    "more new tokens than the model takes": ("abc", "--max-new-tokens", 10**9),
    "no device": ("abc", "--device", ""),
    "a device of no kind": ("abc", "--device", "tpu"),
    "a device that computes nothing": ("abc", "--device", "meta"),
    "a device below the first": ("abc", "--device", "cuda:-1"),
    "a device that is markup": ("abc", "--device", "[x"),
    "no model": ("abc", "--model", ""),
    "a model's name of 300 characters": ("abc", "--model", "a" * 300),
    "a model's name that is not UTF-8": ("abc", "--model", "\udcff"),
    "a file as model": ("abc", "--model", "prompts.jsonl"),
    "a package that is none": ("abc", "--model", "package:"),
    "a package inside of nothing": ("abc", "--model", "package:.x"),
    "a package without files": ("abc", "--model", "package:sys"),
}


@pytest.mark.parametrize("name", selected(list(ODD_WORDS), every=6))
def test_odd_words_on_the_command_line(project, name, attempt) -> None:
    attempt(project, *GENERATE, *ODD_WORDS[name], check=must_be_refused)


def _started(
    project: Project, *words: str, stdout: Any = subprocess.PIPE, **environment: str
) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "layerbudget", *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.Popen(command, cwd=project.folder, env=environment, stdout=stdout, stderr=subprocess.PIPE)


INSPECT = ("inspect", "runs/tiny/allocator")


def test_a_reader_that_has_gone_is_left_in_peace(finished) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    process = _started(finished, *INSPECT, stdout=writer)
    os.close(writer)
    assert process.communicate(timeout=120)[1] == b""
    assert process.returncode == 1


def test_an_output_that_takes_no_more_is_one_sentence(finished) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("this system has no /dev/full")
    with full.open("w") as out:
        error = _started(finished, *INSPECT, stdout=out).communicate(timeout=120)[1].decode()
    assert error.startswith("error: cannot read or write a file: no space left on device")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "shown"),
    [(("ab\u03a9",), b"ab\\u03a9"), (("--prompts", "more.jsonl"), b'"prompt": "ab\\u03a9"')],
    ids=["a prompt", "a file"],
)
def test_an_output_that_lacks_characters_gets_their_numbers(project, words, shown) -> None:
    (project.folder / "more.jsonl").write_text(json.dumps({"prompt": "ab\u03a9"}) + "\n")
    process = _started(project, *GENERATE, *words, PYTHONUTF8="0", PYTHONIOENCODING="latin-1")
    out, error = process.communicate(timeout=180)
    assert process.returncode == 0, error
    assert shown in out
