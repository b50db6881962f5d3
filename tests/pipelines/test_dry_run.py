"""What a run will take: the counts are those of the run, what is done is left out, and nothing is written."""

import sqlite3

import pytest
from command import layerbudget, refused, snapshot

from oracle.prompts import Shard
from pipelines.config import load_config
from pipelines.dry_run import outlook
from pipelines.progress import Lines, console, duration
from pipelines.runner import run_one, run_shard


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch) -> None:
    monkeypatch.setenv("LAYERBUDGET_CACHE", str(tmp_path_factory.mktemp("cache")))


def labels_in(config) -> int:
    """Labels of prompts to learn from: those of stand-ins' examples are under the full plan alone."""
    connection = sqlite3.connect(config.folder / "labels.db")
    (count,) = connection.execute(
        "SELECT COUNT(*) FROM labels WHERE prompt IN (SELECT prompt FROM labels WHERE model LIKE '% with %')"
    ).fetchone()
    connection.close()
    return int(count)


def test_a_run_that_has_not_begun(config_file, tmp_path) -> None:
    file = config_file()
    before = snapshot(tmp_path)
    done = layerbudget("run", file, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert snapshot(tmp_path) == before
    assert not (tmp_path / "runs").exists()
    found = outlook(load_config(file))
    assert found is not None
    assert sum(split.prompts for split in found.splits) == 160
    assert [stage.name for stage in found.stages][:3] == ["menu", "adapt", "label"]
    assert all(stage.seconds > 0 for stage in found.stages)
    assert found.plans == 4
    for split in found.splits:
        assert f"{split.name} " in done.stdout
        assert f"{split.tokens:,}" in done.stdout


def test_what_is_done_is_left_out_and_counts_are_those_of_the_run(config_file, tmp_path) -> None:
    file = config_file()
    config = load_config(file)
    run_one(config, "menu")
    run_one(config, "adapt")
    all_labels = cost(config, "label").what
    run_shard(config, Shard(1, 2))
    part = labels_in(config)
    before = snapshot(tmp_path)
    left = cost(config, "label")
    assert cost(config, "menu").what == "done"
    assert snapshot(tmp_path) == before
    run_one(config, "label")
    assert all_labels == f"{labels_in(config)} labels"
    assert left.what == f"{labels_in(config) - part} labels"
    assert 0 < part < labels_in(config)
    assert cost(config, "label").seconds == 0


def cost(config, name):
    found = outlook(config)
    assert found is not None
    return next(stage for stage in found.stages if stage.name == name)


@pytest.mark.parametrize(
    "sections",
    [
        {"adapt": {"method": "best", "prompts": 8}},
        {"adapt": {"method": "none"}, "menu": {"method": "exiting", "probe_depth": 2, "plans": 3}},
        {"menu": {"method": "block_influence", "probe_depth": 2, "plans": 3}, "label": {"shortcut": False}},
        {"tuning": {"controllers": ["logistic"], "given": {"logistic": {"sets": ["length", "path"], "components": 4}}}},
        {"evaluation": {"template": "Q: {prompt}", "own_judges": 4, "speed_rounds": 1, "speed_tokens": 2}},
    ],
)
def test_other_settings(config_file, sections) -> None:
    found = outlook(load_config(config_file(**sections)))
    assert found is not None
    assert found.seconds > 0
    assert found.disk_bytes > 0


def test_a_finished_run_has_nothing_left(config_file, tmp_path) -> None:
    file = config_file()
    assert layerbudget("run", file).returncode == 0
    before = snapshot(tmp_path)
    assert "every stage is done" in layerbudget("run", file, "--dry-run").stdout
    assert snapshot(tmp_path) == before


def test_what_a_run_would_refuse_is_refused(config_file) -> None:
    assert "no prompts file" in refused("run", config_file(), "--dry-run", "--set", "data.path=none.jsonl")
    assert "no model in the folder" in refused("run", config_file(), "--dry-run", "--set", "model.source=./none")
    said = refused("run", config_file(), "--dry-run", "--set", "menu.probe_depth=6", "--set", "calibration.keep=0.99")
    assert "2 problems: menu.probe_depth must be from 1 to 5 for this model, got 6; a bound of 0.01" in said


def test_where_there_is_no_terminal_a_line_comes_now_and_then(monkeypatch) -> None:
    lines, now = [], [0.0]
    monkeypatch.setattr(console, "print", lambda text, **options: lines.append(text))
    advance = Lines("labels", 1000, clock=lambda: now[0])
    for second in range(1, 101):
        now[0] = second
        advance(5)
    assert lines == [
        "  labels: 150 of 1,000, 2.8 min left",
        "  labels: 300 of 1,000, 2.3 min left",
        "  labels: 450 of 1,000, 1.8 min left",
    ]


def test_durations() -> None:
    seconds = (0.4, 89, 90, 5000, 36000)
    assert [duration(some) for some in seconds] == ["0 s", "89 s", "1.5 min", "83.3 min", "10.0 h"]
