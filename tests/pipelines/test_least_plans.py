"""`layerbudget search`: the least sufficient plans of single prompts, by any searcher, resumed, beside a run."""

import csv
import json
import sqlite3
from pathlib import Path

import pytest
from command import layerbudget, ran, refused
from tiny import N_LAYERS

from backbone.plan import LayerPlan

MENU = {"method": "exits", "probe_depth": 2, "plans": 4, "cheapest_budget": 0.4}


@pytest.fixture
def path(config_file):
    path = config_file(menu=MENU)
    ran("menu", path)
    return path


def searched(path: Path, name: str, *options: object) -> tuple[list[dict[str, str]], str]:
    said = ran("search", path, "--searcher", name, *options)
    folder = path.parent / "runs" / "tiny" / "search"
    assert (folder / f"{name}.svg").read_text().startswith("<svg")
    with (folder / f"{name}.csv").open() as file:
        return list(csv.DictReader(file)), " ".join(said.split())


def count(path: Path) -> int:
    with sqlite3.connect(path.parent / "runs" / "tiny" / "labels.db") as connection:
        (found,) = connection.execute("SELECT COUNT(*) FROM labels").fetchone()
    return int(found)


def test_the_whole_menu_proves_what_it_finds(path) -> None:
    rows, said = searched(path, "bisection", "--prompts", 12)
    menu = [plan["runs"] for plan in json.loads((path.parent / "runs/tiny/menu.json").read_text())["plans"]]
    assert len(rows) == 12
    assert len({row["id"] for row in rows}) == 12
    assert {row["task"] for row in rows} == {"short", "long"}
    for row in rows:
        assert row["plan"] in menu
        assert row["proved"] == "True"
        assert float(row["budget"]) == pytest.approx(LayerPlan.parse(row["plan"], N_LAYERS).layers / N_LAYERS)
        assert min(menu.index(row["plan"]) + 1, len(menu) - 1) <= int(row["evaluations"]) < len(menu)
    assert len({row["plan"] for row in rows}) > 1, "prompts differ"
    full = sum(float(row["budget"]) == 1 for row in rows)
    mean = sum(float(row["budget"]) for row in rows) / 12
    assert f"12 prompts: {mean:.0%} of the decoder" in said
    assert f"{full} in full, 12 proved" in said


def test_search_beyond_the_menu_resumes_and_gets_no_dearer(path) -> None:
    over_menu, _ = searched(path, "bisection", "--prompts", 6)
    rows, _ = searched(path, "greedy", "--prompts", 6, "--evaluations", 8)
    made = count(path)
    assert {row["proved"] for row in rows} == {"False"}
    assert any(row["plan"] not in {one["plan"] for one in over_menu} for row in rows)
    again, _ = searched(path, "greedy", "--prompts", 6, "--evaluations", 8)
    assert again == rows
    assert count(path) == made, "nothing was labelled twice"
    longer, _ = searched(path, "greedy", "--prompts", 6, "--evaluations", 12)
    assert all(float(b["budget"]) <= float(a["budget"]) for a, b in zip(rows, longer, strict=True))


def test_a_run_takes_no_notice(path) -> None:
    searched(path, "bisection", "--prompts", 4)
    for stage in ("adapt", "label"):
        ran(stage, path)


def test_what_cannot_be_searched_is_one_sentence(path, config_file) -> None:
    assert "'mctss' is not among the searchers; did you mean 'mcts'?" in refused("search", path, "--searcher", "mctss")
    assert "no split 'all'; there are adapt, train" in layerbudget("search", path, "--split", "all").stderr
    assert "a search needs a menu first" in refused("search", config_file("b.yaml", name="b"), "--evaluations", 3)
    mine = path.parent / "runs" / "tiny" / "search" / "notes.txt"
    mine.parent.mkdir()
    mine.write_text("mine")
    assert "lies in a folder that a stage replaces" in refused("search", path, "--prompts", 2, "--evaluations", 1)
    assert mine.read_text() == "mine"
    assert not (mine.parents[1] / "labels.db").exists(), "nothing was searched before the place was looked at"
