"""MLflow's database: killed while it is made, made by two runs at once, older than this MLflow, or broken."""

from __future__ import annotations

import random
import shutil
import signal
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from child import Ended, Limits
from pressing import Press
from project import Project
from selection import LONG

STATEMENT = "sqlalchemy.engine.default:DefaultDialect.do_execute"
STATEMENTS = {"none": 600, "older": 250}
"""Of SQL, at least, from which a database is made or migrated and the run logged."""
KILLS = [(store, place) for store in STATEMENTS for place in ([*range(50)] if LONG else [0])]
PAIRS = range(20 if LONG else 1)


@pytest.fixture(scope="session")
def stores(base: Path) -> dict[str, Path | None]:
    """A database as MLflow made it 30 migrations ago, with an experiment, and what breaks off a migration of it."""
    from alembic import command
    from alembic.script import ScriptDirectory
    from mlflow.store.db import utils
    from mlflow.store.tracking.dbmodels.initial_models import Base
    from sqlalchemy import create_engine

    older = base / "older.db"
    config = utils._get_alembic_config(f"sqlite:///{older}")
    engine = create_engine(f"sqlite:///{older}")
    Base.metadata.create_all(engine)
    command.upgrade(config, [script.revision for script in ScriptDirectory.from_config(config).walk_revisions()][30])
    engine.dispose()
    with closing(sqlite3.connect(older)) as connection, connection:
        connection.execute(
            "INSERT INTO experiments (name, artifact_location, lifecycle_stage) VALUES ('a', 'b', 'active')"
        )
    half, broken = base / "half.db", base / "broken.db"
    shutil.copy(older, half)
    with closing(sqlite3.connect(half)) as connection, connection:
        connection.execute("UPDATE alembic_version SET version_num = '451aebb31d03'")  # whose columns are there
    broken.write_bytes(b"SQLite format 3\0" + bytes(range(256)) * 64)
    return {"none": None, "older": older, "half": half, "broken": broken}


def own_store(project: Project, store: Path | None) -> Path:
    """The database of the project alone, given to it as it is, or not there."""
    path = project.folder / "own" / "mlflow.db"
    path.parent.mkdir()
    if store is not None:
        shutil.copy(store, path)
    return path


def told(project: Project, command: str, database: Path, limits: Limits | None = None) -> Ended:
    return project.command(command, "tiny.yaml", "--set", f"tracking.uri=sqlite:///{database}", limits=limits)


def finished_runs(database: Path) -> int:
    with closing(sqlite3.connect(database)) as connection:
        return sum(connection.execute("SELECT COUNT(*) FROM runs WHERE status = 'FINISHED'").fetchone())


@pytest.mark.parametrize(("store", "number"), KILLS)
def test_a_store_killed_while_made_goes_on(
    project: Project, stores: dict[str, Path], record_property: Callable[[str, Any], None], store: str, number: int
) -> None:
    database = own_store(project, stores[store])
    statement = random.Random(f"{store} {number}").randint(1, STATEMENTS[store])
    press = Press(STATEMENT, call=statement, signal=signal.SIGKILL)
    killed = told(project, "run", database, Limits(press=press))
    assert killed.status == -signal.SIGKILL, killed.err
    checked, ended = told(project, "check", database), told(project, "run", database)
    assert (checked.status, ended.status) == (0, 0), checked.err + ended.err
    assert finished_runs(database) == 1
    if store == "older":
        with closing(sqlite3.connect(database)) as connection:
            assert connection.execute("SELECT name FROM experiments WHERE name = 'a'").fetchall()
    record_property("counted", f"stores killed and gone on from: {store} before")


@pytest.mark.parametrize("number", PAIRS)
def test_two_runs_that_make_one_store_end_well(
    finished: Project, tmp_path: Path, record_property: Callable[[str, Any], None], number: int
) -> None:
    pair = [finished.copy(tmp_path / name) for name in ("one", "two")]
    database = tmp_path / "own" / "mlflow.db"
    with ThreadPoolExecutor(2) as threads:
        ended = list(threads.map(lambda project: told(project, "run", database), pair))
    assert [one.status for one in ended] == [0, 0], "".join(one.err for one in ended)
    assert finished_runs(database) == 2
    record_property("counted", "pairs of runs that made one store")


@pytest.mark.parametrize("store", ["half", "broken"])
def test_a_broken_store_is_named_and_logged_to_later(project: Project, stores: dict[str, Path], store: str) -> None:
    database = own_store(project, stores[store])
    before = (project.run / "metrics.json").read_bytes()
    for command in ("check", "report"):
        ended = told(project, command, database)
        assert ended.status == 2, ended.out + ended.err
        assert ended.err.count("error: ") == 1
        assert f"move {database} away" in ended.err
    assert f"the run's results are in {project.run.relative_to(project.folder)}" in ended.err
    assert (project.run / "metrics.json").read_bytes() == before
    assert (project.run / "report.html").is_file()
    database.unlink()
    ended = told(project, "run", database)
    assert ended.status == 0, ended.err
    assert ended.out.count("done before") == 8
    assert finished_runs(database) == 1
