"""Prompts from a data set, a damaged model, and an output that takes no more."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from child import ROOT
from damage import damages_of
from outcome import differences, judged
from project import Project, prompt_rows
from selection import selected

QUICK = ("--set", "menu={method: given, given: ['0-1,5'], probe_depth: 2}", "--set", "name=new")


def _table(project: Project) -> Path:
    """The prompts as a folder with a CSV file, which `datasets` loads."""
    folder = project.folder / "table"
    folder.mkdir()
    rows = prompt_rows(project)
    with (folder / "train.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows({**row, "reference": "x"} for row in rows)
    return folder / "train.csv"


LINES = {
    "an empty prompt": "id-x,long,,x,agreement",
    "no judge": "id-x,long,abc,x,",
    "too few columns": "id-x,long",
    "too many columns": "id-x,long,abc,x,agreement,more",
    "an open quote": 'id-x,long,"abc,x,agreement',
    "U+2028": "id-x,long,ab\u2028cd,x,agreement",
}
FROM_TABLES = [*damages_of("table.csv"), "not UTF-8", *LINES, "another header"]


@pytest.mark.parametrize("name", selected(FROM_TABLES, every=12))
def test_a_damaged_table_of_prompts(project, limits, name, expect_good) -> None:
    path = _table(project)
    if name in LINES:
        path.write_text(path.read_text().replace("\n", f"\n{LINES[name]}\n", 1))
    elif name == "another header":
        path.write_text(path.read_text().replace("prompt", "question", 1))
    else:
        damages_of("table.txt" if name == "not UTF-8" else "table.csv")[name](path)
    foreign = project.foreign
    ended = project.command("menu", "tiny.yaml", *QUICK, "--set", "data.path=table", limits=limits)
    must = {*LINES, "another header", "missing", "empty", "zeros"} - {"U+2028", "too many columns"}
    expect_good(*judged(ended, project, foreign, lambda: "it should have been refused" if name in must else None))


WEIGHTS = "model.safetensors"
MODEL_FILES = ("config.json", "generation_config.json", WEIGHTS, "tokenizer.json", "tokenizer_config.json")
OF_MODELS = [
    (name, damage) for name in MODEL_FILES for damage in damages_of(name) if (name, damage[:4]) != (WEIGHTS, "bits")
]
"""A flipped bit of a weight is seen only where the fingerprint reads it: the format has no checksum."""


@pytest.mark.parametrize(("name", "damage"), selected(OF_MODELS, every=30))
def test_a_damaged_model(project, finished, base, limits, name, damage, expect_good) -> None:
    """A finished run knows its model; what is damaged is refused, or makes no difference to any result."""
    shutil.copytree(base / "model", project.folder / "model")
    path = project.folder / "model" / name
    damages_of(name)[damage](path)
    foreign = project.foreign
    model = ("--model", project.folder / "model")
    ended = project.command("generate", "--allocator", "runs/tiny/allocator", *model, "abcabc", limits=limits)
    undamaged = finished.command("generate", "--allocator", "runs/tiny/allocator", "abcabc")
    expect_good(
        *judged(
            ended,
            project,
            foreign,
            lambda: None if _answer(ended.out) == _answer(undamaged.out) else "another answer than undamaged",
        )
    )


def _answer(out: str) -> str:
    return out[out.index("\nabcabc") :]


@pytest.mark.parametrize(
    "setting",
    ["tracking.uri=sqlite:////dev/full/x.db", "tracking.uri=sqlite:///notes.txt", "tracking.experiment=' '",
     "tuning.storage=sqlite:///notes.txt", "tuning.storage=sqlite:////dev/full/x.db"],
)  # fmt: skip
def test_stores_that_are_none(project, finished, setting, expect_good) -> None:
    foreign = project.foreign
    ended = project.command("run", "tiny.yaml", "--set", setting)
    expect_good(*judged(ended, project, foreign, lambda: differences(finished, project)))


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
def test_odd_words_on_the_command_line(project, name, expect_good) -> None:
    ended = project.command("generate", "--allocator", "runs/tiny/allocator", *ODD_WORDS[name])
    expect_good(*judged(ended, project, project.foreign, lambda: "it should have been refused"))


def _inspect(project: Project, stdout) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "layerbudget", "inspect", "runs/tiny/allocator"],
        cwd=project.folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=stdout,
        stderr=subprocess.PIPE,
    )


def test_a_reader_that_has_gone_is_left_in_peace(finished) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    process = _inspect(finished, writer)
    os.close(writer)
    assert process.communicate(timeout=120)[1] == b""
    assert process.returncode == 1


def test_an_output_that_takes_no_more_is_one_sentence(finished) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("this system has no /dev/full")
    with full.open("w") as out:
        error = _inspect(finished, out).communicate(timeout=120)[1].decode()
    assert error.startswith("error: cannot read or write a file: no space left on device")
    assert error.count("\n") == 1


@pytest.mark.parametrize("words", [("ab\u03a9",), ("--prompts", "more.jsonl")], ids=["a prompt", "a file"])
def test_an_output_that_lacks_characters_gets_their_numbers(project, words) -> None:
    (project.folder / "more.jsonl").write_text(json.dumps({"prompt": "ab\u03a9"}) + "\n")
    done = subprocess.run(
        [sys.executable, "-m", "layerbudget", "generate", "--allocator", "runs/tiny/allocator", *words],
        cwd=project.folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUTF8": "0", "PYTHONIOENCODING": "latin-1"},
        capture_output=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    if words[0] == "--prompts":
        assert json.loads(done.stdout)["prompt"] == "ab\u03a9"
    else:
        assert b"ab\\u03a9" in done.stdout
