"""The stage `adapt` by every method, through the command line."""

import json
import sqlite3
from pathlib import Path
from unittest.mock import patch

import pytest
import yaml
from command import layerbudget, refused

ADAPTED = {"epochs": 4, "batch_tokens": 256, "lora_rank": 4, "prompts": 40}


@pytest.mark.parametrize("method", ["none", "bridges", "adapter", "both"])
def test_shortened_plans_are_adapted_in_every_way(config_file, method) -> None:
    path = config_file(adapt={"method": method, **ADAPTED})
    done = layerbudget("run", path)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = Path(yaml.safe_load(path.read_text())["runs"]) / "tiny"
    record = json.loads((folder / "adapt.json").read_text())
    metrics = json.loads((folder / "metrics.json").read_text())
    assert record["method"] == metrics["healing"]["method"] == method
    assert ("bridges" in record) == (method in ("bridges", "both"))
    assert (f"training_{method}" in record) == (method in ("adapter", "both"))
    added = sum(record["added_budget"].values())
    assert (added > 0) == (method in ("bridges", "both"))
    assert (folder / "allocator" / "healing.safetensors").exists() == (method != "none")
    with sqlite3.connect(folder.parent.parent / "mlruns" / "mlflow.db") as connection:
        keys = {key for (key,) in connection.execute("SELECT DISTINCT key FROM metrics")}
    assert any(key.startswith(f"training_{method}/held_kl/0-") for key in keys) == (method in ("adapter", "both"))
    budgets = [budget for budget, _ in metrics["healing"]["after"]["static"]]
    frozen = [plan["budget"] for plan in json.loads((folder / "menu.json").read_text())["plans"]]
    assert sum(budgets) == pytest.approx(sum(frozen) + added)


def test_healing_of_another_run_are_taken(config_file) -> None:
    """A GPU may train what a CPU labels with: the second run trains nothing, and has the same healing parts."""
    path = config_file(adapt={"method": "both", **ADAPTED})
    for stage in ("menu", "adapt"):
        assert layerbudget(stage, path).returncode == 0
    first = Path(yaml.safe_load(path.read_text())["runs"]) / "tiny"
    given = config_file(
        "second.yaml", name="second", adapt={"method": "given", "given": str(first / "healing.safetensors")}
    )
    for stage in ("menu", "adapt"):
        done = layerbudget(stage, given)
        assert done.returncode == 0, done.stdout + done.stderr
    second = first.parent / "second"
    records = [json.loads((folder / "adapt.json").read_text()) for folder in (first, second)]
    assert records[1]["method"] == "given"
    assert [record["digest"] for record in records] == [records[0]["digest"]] * 2
    assert records[0]["added_budget"] == records[1]["added_budget"]
    assert not any(name.startswith("training") for name in records[1])
    done = layerbudget("adapt", given, "--set", "menu.plans=3")
    assert done.returncode == 2, "another menu needs its stage first"
    assert layerbudget("menu", given, "--set", "menu.plans=3", "--set", "menu.method=exits").returncode == 0
    said = refused("adapt", given, "--set", "menu.plans=3", "--set", "menu.method=exits")
    assert "has no bridges for the plan" in said


def test_given_healing_must_be_there(config_file) -> None:
    path = config_file(adapt={"method": "given", "given": "nowhere.safetensors"})
    assert "adapt.given: there is no file nowhere.safetensors" in refused("check", path)


def test_the_best_way_to_adapt_is_measured_on_the_tune_split(config_file) -> None:
    path = config_file(adapt={"method": "best", **ADAPTED})
    done = layerbudget("adapt", path, "--set", "menu.plans=3")
    assert done.returncode == 2
    done = layerbudget("menu", path)
    done = layerbudget("adapt", path)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = Path(yaml.safe_load(path.read_text())["runs"]) / "tiny"
    record = json.loads((folder / "adapt.json").read_text())
    areas = {method: row["area"] for method, row in record["compared"].items()}
    assert set(areas) == {"none", "bridges", "adapter", "both"}
    assert record["method"] == max(areas, key=lambda method: areas[method])


def test_too_few_tokens_for_full_bridges_are_said(config_file) -> None:
    path = config_file(adapt={"method": "bridges", "prompts": 8})
    layerbudget("menu", path)
    with patch("backbone.healing.ridge_regression.TOKENS_PER_INPUT", 50):
        done = layerbudget("adapt", path)
    assert "too few for full bridges" in done.stdout
