"""CONTRIBUTING followed word by word: a package of one's own adds a controller, a judge, a menu and a searcher."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tiny import tiny_model, tiny_tokenizer
from tiny_run import tiny_settings, write_prompts

from oracle import search

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text()


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder with the files that CONTRIBUTING shows, and its package installed in `site`."""
    folder = tmp_path_factory.mktemp("my_layers")
    named = re.findall(r"`([\w.]+\.(?:py|toml))`;?[^`]*?:\n\n```\w+\n(.*?)```", TEXT, re.S)
    assert [name for name, _ in named] == ["pyproject.toml", "my_layers.py", "test_my_layers.py"]
    for name, content in named:
        (folder / name).write_text(content)
    site = folder / "site"
    offline = ["--no-deps", "--no-index", "--no-build-isolation", "--target", str(site)]
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *offline, str(folder)], check=True)
    (folder / "my_layers.py").unlink()  # so that only the installed one can be found
    return folder


def ran(installed: Path, *command: object) -> str:
    """What a command prints that finds the package."""
    paths = os.pathsep.join([str(installed / "site"), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": paths, "COLUMNS": "200"}
    words = [sys.executable, "-m", *map(str, command)]
    done = subprocess.run(words, cwd=installed, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_suites_prove_the_package(installed) -> None:
    said = re.search(r"(\d+) passed", ran(installed, "pytest", "test_my_layers.py", "-p", "no:cacheprovider"))
    assert said is not None
    assert int(said[1]) >= 15


def test_a_run_uses_all_of_it_through_to_the_report(installed) -> None:
    tiny_model("llama", layer_scale=0.5).save_pretrained(installed / "model")
    tiny_tokenizer().save_pretrained(installed / "model")
    prompts = write_prompts(installed / "prompts.jsonl")
    (installed / "tiny.yaml").write_text(yaml.safe_dump(tiny_settings(installed, installed / "model", prompts)))
    shown = re.search(r"layerbudget run CONFIG (--set .*same_length)", TEXT)
    assert shown is not None
    ran(installed, "layerbudget", "run", "tiny.yaml", *shown[1].split())
    run = installed / "runs" / "tiny"
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["best"] == "knn"
    assert metrics["knn"]["quality_ratio"] >= 0
    assert "knn" in (run / "report.html").read_text()
    assert "Controller   knn" in ran(installed, "layerbudget", "inspect", run / "allocator")


def test_the_searcher_is_known_by_its_name(installed) -> None:
    code = f"from {search.__name__} import SEARCHERS; print(type(SEARCHERS['dearest_first']).__name__)"
    (installed / "known.py").write_text(code)
    assert ran(installed, "known").strip() == "DearestFirst"
