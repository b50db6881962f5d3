"""Every file of a finished run, damaged: it is made again as it was, or refused, and never believed."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as parquet
import pytest
from damage import Damage, damages_of
from keys import WRONG, without, wrong
from outcome import differences, judged, lost_labels
from project import Project
from selection import selected

FILES = (
    "run.json", "config.yaml", "model.*", "menu.json", "healing.safetensors", "adapt.json", "labels.db",
    "features.parquet", "tuning.db", "tuning.json", "winner.yaml", "controllers/mlp/controller.safetensors",
    "controllers/mlp/projection.safetensors", "expected_losses.npz", "calibration.json", "allocator/manifest.json",
    "allocator/menu.json", "allocator/controller.safetensors", "metrics.json", "choices.json", "report.html",
    "logged.json",
)  # fmt: skip
CASES = [(name, damage) for name in FILES for damage in damages_of(name)]


def _sql(*statements: str) -> Damage:
    def damage(path: Path) -> None:
        connection = sqlite3.connect(path)
        with connection:
            for statement in statements:
                connection.execute(statement)
        connection.close()

    return damage


DATABASES: list[tuple[str, str, Damage]] = [
    ("labels.db", "half of the labels", _sql("DELETE FROM labels WHERE prompt < '8'")),
    ("labels.db", "no labels", _sql("DELETE FROM labels")),
    ("labels.db", "no table", _sql("DROP TABLE labels")),
    ("labels.db", "another table", _sql("DROP TABLE labels", "CREATE TABLE labels (x)")),
    ("labels.db", "another version", _sql("PRAGMA user_version=77")),
    ("labels.db", "a text as score", _sql("UPDATE labels SET score = 'good'")),
    ("labels.db", "scores above 1", _sql("UPDATE labels SET score = 7.5")),
    ("labels.db", "tokens that are none", _sql("UPDATE labels SET answer_ids = 'one two'")),
    ("labels.db", "other labels", _sql("UPDATE labels SET score = 1 - score WHERE score IS NOT NULL")),
    ("tuning.db", "no table of trials", _sql("DROP TABLE trials")),
    ("tuning.db", "no studies", _sql("DELETE FROM studies")),
    ("tuning.db", "no values", _sql("DELETE FROM trial_values")),
]  # fmt: skip


def _features(change: Callable) -> Damage:
    def damage(path: Path) -> None:
        parquet.write_table(change(parquet.read_table(path)), path)

    return damage


FEATURES: dict[str, Damage] = {
    "no ids": _features(lambda table: table.drop_columns(["id"])),
    "half of the rows": _features(lambda table: table.slice(0, table.num_rows // 2)),
    "no metadata": _features(lambda table: table.replace_schema_metadata(None)),
    "no columns": _features(lambda table: table.select([])),
}
STATE = [
    (keys, what)
    for keys in [("config",), ("model",), ("stages",), ("stages", "menu"), ("stages", "label"), ("stages", "report")]
    for what in ("missing", *WRONG)
]


def _checked(project: Project, finished: Project, name: str, ended, foreign) -> tuple:
    def wrong() -> str | None:
        return differences(finished, project) or (None if name == "labels.db" else lost_labels(finished, project))

    return judged(ended, project, foreign, wrong)


@pytest.mark.parametrize(("name", "damage"), selected(CASES, every=40))
def test_a_run_makes_a_damaged_file_again_or_refuses_it(project, finished, limits, name, damage, expect_good) -> None:
    (path,) = project.run.glob(name)
    damages_of(path.name)[damage](path)
    ended = project.command("run", "tiny.yaml", limits=limits)
    expect_good(*_checked(project, finished, name, ended, project.foreign))


@pytest.mark.parametrize("damage", selected(list(damages_of("controller.safetensors")), every=20))
def test_a_run_makes_damaged_trees_again_or_refuses_them(trees, tmp_path, limits, damage, expect_good) -> None:
    project = trees.copy(tmp_path / "project")
    damages_of("controller.safetensors")[damage](project.run / "controllers" / "lightgbm" / "controller.safetensors")
    ended = project.command("run", "tiny.yaml", limits=limits)
    expect_good(*_checked(project, trees, "controllers", ended, project.foreign))


@pytest.mark.parametrize(("keys", "what"), selected(STATE, every=26))
def test_a_wrong_state_of_the_stages(project, finished, limits, keys, what, expect_good) -> None:
    (without(keys) if what == "missing" else wrong(keys, WRONG[what]))(project.run / "run.json")
    ended = project.command("run", "tiny.yaml", limits=limits)
    expect_good(*_checked(project, finished, "run.json", ended, project.foreign))


@pytest.mark.parametrize("command", ["run", "tune"])
@pytest.mark.parametrize(
    ("name", "what", "damage"), selected(DATABASES, every=5), ids=lambda value: value if isinstance(value, str) else ""
)
def test_a_damaged_database(project, finished, limits, command, name, what, damage, expect_good) -> None:
    damage(project.run / name)
    ended = project.command(command, "tiny.yaml", limits=limits)
    expect_good(*_checked(project, finished, name, ended, project.foreign))


@pytest.mark.parametrize("command", ["run", "tune", "calibrate"])
@pytest.mark.parametrize("what", selected(list(FEATURES), every=4))
def test_damaged_features(project, finished, limits, command, what, expect_good) -> None:
    FEATURES[what](project.run / "features.parquet")
    ended = project.command(command, "tiny.yaml", limits=limits)
    expect_good(*_checked(project, finished, "features.parquet", ended, project.foreign))


@pytest.mark.parametrize("damage", selected(list(damages_of("tuning.db")), every=7))
def test_a_stage_that_goes_on_with_a_damaged_search(project, finished, limits, damage, expect_good) -> None:
    """The search is only looked into when the stage is done again."""
    damages_of("tuning.db")[damage](project.run / "tuning.db")
    ended = project.command("tune", "tiny.yaml", limits=limits)
    expect_good(*_checked(project, finished, "tuning.db", ended, project.foreign))


def test_every_file_of_a_run_is_in_the_table(finished) -> None:
    found = {path.relative_to(finished.run).as_posix() for path in finished.run.rglob("*") if path.is_file()}
    named = {path.relative_to(finished.run).as_posix() for name in FILES for path in finished.run.glob(name)}
    rest = {name for name in found - named if not name.startswith((".", "allocator/", "controllers/"))}
    assert rest == {"notes.txt"}
