"""The stage `adapt` by every method, through the command line."""

import json
import sqlite3
from unittest.mock import patch

import pytest
from command import ran, refused

ADAPTED = {"epochs": 4, "batch_tokens": 256, "lora_rank": 4, "prompts": 40}


@pytest.mark.parametrize("method", ["none", "bridges", "adapter", "both"])
def test_shortened_plans_are_adapted_in_every_way(config_file, method) -> None:
    path = config_file(adapt={"method": method, **ADAPTED})
    ran("run", path)
    folder = path.parent / "runs" / "tiny"
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
        ran(stage, path)
    first = path.parent / "runs" / "tiny"
    given = config_file(
        "second.yaml", name="second", adapt={"method": "given", "given": str(first / "healing.safetensors")}
    )
    for stage in ("menu", "adapt"):
        ran(stage, given)
    second = first.parent / "second"
    records = [json.loads((folder / "adapt.json").read_text()) for folder in (first, second)]
    assert records[1]["method"] == "given"
    assert [record["digest"] for record in records] == [records[0]["digest"]] * 2
    assert records[0]["added_budget"] == records[1]["added_budget"]
    assert not any(name.startswith("training") for name in records[1])
    other = ("--set", "menu.plans=3", "--set", "menu.method=exits")
    assert "the stage 'adapt' needs 'menu' first" in refused("adapt", given, *other)
    ran("menu", given, *other)
    assert "has no bridges for the plan" in refused("adapt", given, *other)


def test_the_best_way_to_adapt_is_measured_on_the_tune_split(config_file) -> None:
    path = config_file(adapt={"method": "best", **ADAPTED})
    for stage in ("menu", "adapt"):
        ran(stage, path)
    record = json.loads((path.parent / "runs" / "tiny" / "adapt.json").read_text())
    areas = {method: row["area"] for method, row in record["compared"].items()}
    assert set(areas) == {"none", "bridges", "adapter", "both"}
    assert record["method"] == max(areas, key=lambda method: areas[method])


def test_too_few_tokens_for_full_bridges_are_said(config_file) -> None:
    path = config_file(adapt={"method": "bridges", "prompts": 8})
    ran("menu", path)
    with patch("backbone.healing.ridge_regression.TOKENS_PER_INPUT", 50):
        assert "too few for full bridges" in ran("adapt", path)
