"""Every file of a finished run, damaged: it is made again as it was, or refused, and never believed."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as parquet
import pytest
from child import Ended
from damage import Damage, damages_of
from keys import WAYS, value_damaged
from outcome import differences, lost_labels
from project import Project
from selection import selected

FILES = (
    "run.json", "config.yaml", "model.*", "menu.json", "healing.safetensors", "adapt.json", "labels.db",
    "features.parquet", "tuning.db", "tuning.json", "winner.yaml", "controllers/mlp/controller.safetensors",
    "controllers/mlp/projection.safetensors", "expected_losses.npz", "calibration.json", "allocator/manifest.json",
    "allocator/menu.json", "allocator/controller.safetensors", "metrics.json", "choices.json", "report.html",
    "logged.json",
)  # fmt: skip
DamagedFile = tuple[str, str, Damage]
"""Name of a file, how it is damaged, and the damage."""


def _sql(*statements: str) -> Damage:
    def damage(path: Path) -> None:
        connection = sqlite3.connect(path)
        with connection:
            for statement in statements:
                connection.execute(statement)
        connection.close()

    return damage


DATABASES: list[DamagedFile] = [
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


FEATURES: list[DamagedFile] = [
    ("features.parquet", "no ids", _features(lambda table: table.drop_columns(["id"]))),
    ("features.parquet", "half of the rows", _features(lambda table: table.slice(0, table.num_rows // 2))),
    ("features.parquet", "no metadata", _features(lambda table: table.replace_schema_metadata(None))),
    ("features.parquet", "no columns", _features(lambda table: table.select([]))),
]
STATES: list[DamagedFile] = [
    ("run.json", f"{'.'.join(keys)} {way}", value_damaged(keys, way))
    for keys in [("config",), ("model",), ("stages",), ("stages", "menu"), ("stages", "label"), ("stages", "report")]
    for way in WAYS
]
TREES = "controllers/lightgbm/controller.safetensors"


def in_any_way(*names: str) -> list[DamagedFile]:
    return [(name, way, damage) for name in names for way, damage in damages_of(name).items()]


DATABASES_AND_FEATURES = [*selected(DATABASES, every=5), *selected(FEATURES, every=4)]
CASES = {
    "run": [
        *selected(in_any_way(*FILES), every=40),
        *selected(in_any_way(TREES), every=20),
        *selected(STATES, every=26),
        *DATABASES_AND_FEATURES,
    ],
    "tune": [*DATABASES_AND_FEATURES, *selected(in_any_way("tuning.db"), every=7)],
    "calibrate": selected(FEATURES, every=4),
}
"""By the command that meets the damaged file; a finished search is only looked into by `tune`."""


@pytest.mark.parametrize(
    ("command", "name", "damage"),
    [
        pytest.param(command, name, damage, id=f"{command} {name} {way}")
        for command, cases in CASES.items()
        for name, way, damage in cases
    ],
)
def test_a_damaged_file_is_made_again_or_refused(request, tmp_path, attempt, command, name, damage) -> None:
    whole: Project = request.getfixturevalue("trees" if name == TREES else "finished")
    project = whole.copy(tmp_path / "project")
    (path,) = project.run.glob(name)
    damage(path)

    def wrong(ended: Ended) -> str | None:
        return differences(whole, project) or (None if name == "labels.db" else lost_labels(whole, project))

    attempt(project, command, "tiny.yaml", check=wrong)


def test_every_file_of_a_run_is_in_the_table(finished) -> None:
    found = {path.relative_to(finished.run).as_posix() for path in finished.run.rglob("*") if path.is_file()}
    named = {path.relative_to(finished.run).as_posix() for name in FILES for path in finished.run.glob(name)}
    rest = {name for name in found - named if not name.startswith((".", "allocator/", "controllers/"))}
    assert rest == {"notes.txt"}
