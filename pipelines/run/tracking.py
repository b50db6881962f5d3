"""Every finished run in MLflow: parameters, metrics, figures, and the saved allocator."""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import sqlite3
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from backbone.errors import reason_of
from backbone.files import lock_of, remove_strays, replacing, write_atomically
from pipelines.config import Config, ConfigError
from pipelines.run.run_record import ARTIFACTS, began_ms, headlines, parameters, prompts_input, tags

ANSWER_SECONDS = 5
PORTS = {"http": 80, "https": 443, "postgresql": 5432, "mysql": 3306, "mssql": 1433}
"""Where servers listen whose URI names no port."""
LOGGED = "logged.json"
"""In the run folder: where the run was logged. It is there only once all of it is."""


def log_run(config: Config, metrics: Mapping[str, Any], figures: Mapping[str, str], folder: Path) -> None:
    """Log one run to `tracking.uri`, and say so in the file `LOGGED`; one process at a time uses a database.

    See `pipelines.run.run_record` for what becomes a metric, a parameter or a tag. Of the run folder the allocator and
    `ARTIFACTS` are kept.

    Raises:
        ConfigError: the tracking store cannot be used.
    """
    uri, database = config.tracking.uri, _embedded_database(config.tracking.uri)
    (folder / LOGGED).unlink(missing_ok=True)
    try:
        check_answers("tracking.uri", uri)
        with _store_usable(uri), nullcontext() if database is None else lock_of(database):
            if database is not None and not _is_current(database):
                _migrate(database)
            run = _log(config, metrics, figures, folder)
    except ConfigError as error:
        raise ConfigError(f"{error}; the run's results are in {folder}, the next `layerbudget run` logs it") from error
    write_atomically(folder / LOGGED, json.dumps({"uri": uri, "run": run}) + "\n")


def _log(config: Config, metrics: Mapping[str, Any], figures: Mapping[str, str], folder: Path) -> str:
    """The id of the run in MLflow."""
    import mlflow

    mlflow.set_tracking_uri(config.tracking.uri)
    with _begun_run(config, metrics, folder) as run:
        tuning = json.loads((folder / "tuning.json").read_text(encoding="utf-8"))
        mlflow.log_params(parameters(config, tuning))
        mlflow.log_metrics(headlines(metrics))
        for key, value, step in _training(json.loads((folder / "adapt.json").read_text())):
            mlflow.log_metric(key, value, step=step)
        counts = {split: str(count) for split, count in metrics["prompts"].items()}
        mlflow.log_input(prompts_input(config), context="prompts", tags=counts)
        for name, text in figures.items():
            mlflow.log_text(text, f"figures/{name}.svg")
        for name in ARTIFACTS:
            mlflow.log_artifact(str(folder / name))
        mlflow.log_artifacts(str(folder / "allocator"), "allocator")
    return str(run.info.run_id)


def _begun_run(config: Config, metrics: Mapping[str, Any], folder: Path) -> Any:
    """A run of MLflow as a context, as long as all stages took, with its tags."""
    import mlflow
    from mlflow.tracking.context.registry import resolve_tags

    client, experiment = mlflow.MlflowClient(), _experiment(config)
    named = resolve_tags(tags(config, metrics))
    run = client.create_run(experiment, start_time=began_ms(folder), tags=named, run_name=config.name)
    return mlflow.start_run(run_id=run.info.run_id)


def _training(record: Mapping[str, Any]) -> Iterator[tuple[str, float, int]]:
    """Name, value and step of what an adapter's training went through: its loss, and the held one of every plan."""
    for name, history in record.items():
        if not name.startswith("training_"):
            continue
        for step, loss, held in zip(history["steps"], history["losses"], history["held"], strict=True):
            if step:
                yield f"{name}/loss", loss, step
            for plan, value in held.items():
                yield f"{name}/held_kl/{plan.replace(',', ' ')}", value, step


def log_verdict(config: Config, reason: str) -> None:
    """Put a trial's verdict on its run in MLflow, as the tag `verdict`; a run that could not be logged has none."""
    from mlflow import MlflowClient

    if not (path := config.folder / LOGGED).is_file():
        return
    logged = json.loads(path.read_text(encoding="utf-8"))
    with _store_usable(config.tracking.uri):
        MlflowClient(tracking_uri=logged["uri"]).set_tag(logged["run"], "verdict", reason)


def check_answers(key: str, uri: str) -> None:
    """Raises ConfigError where a setting names a server that does not answer; libraries try for minutes."""
    try:
        place = urlsplit(uri)
        port = place.port or PORTS.get(place.scheme.partition("+")[0])
        if not place.hostname or port is None:
            return
        with socket.create_connection((place.hostname, port), ANSWER_SECONDS) as connection:
            if place.scheme == "http":
                connection.sendall(f"GET /health HTTP/1.0\r\nHost: {place.hostname}\r\n\r\n".encode())
                if not connection.recv(1):
                    raise ConnectionError("the connection was closed without an answer")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"no server answers at {key}={uri} within {ANSWER_SECONDS} s ({reason_of(error)}); start one there, or "
            f"name another {key}"
        ) from None


def check_store(uri: str) -> None:
    """Whether MLflow can use a store: a database of an older schema is brought to this one's in a copy, to be sure.

    A database that is not there is made when a run is logged.

    Raises:
        ConfigError: the tracking store cannot be used.
    """
    database = _embedded_database(uri)
    if database is None:
        check_answers("tracking.uri", uri)
        with _store_usable(uri):
            from mlflow import MlflowClient

            MlflowClient(tracking_uri=uri)
    elif database.exists():
        with _store_usable(uri), tempfile.TemporaryDirectory() as folder:
            if not _is_current(database):
                _copy_migrated(database, Path(folder) / database.name)


@contextmanager
def _store_usable(uri: str) -> Iterator[None]:
    """What MLflow cannot do with its store, in one sentence."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    for name in ("alembic", "mlflow.store.db.utils"):
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        yield
    except Exception as error:
        from mlflow.exceptions import MlflowException
        from sqlalchemy.exc import SQLAlchemyError

        if not isinstance(error, MlflowException | SQLAlchemyError | sqlite3.Error | ImportError | OSError):
            raise
        remedy = "" if (database := _embedded_database(uri)) is None else f"; mend that, or move {database} away"
        raise ConfigError(f"cannot log to tracking.uri {uri!r}: {reason_of(error):.200}{remedy}") from error


def _embedded_database(uri: str) -> Path | None:
    path = uri.removeprefix("sqlite:///").partition("?")[0]
    return Path(path) if uri.startswith("sqlite:///") and path not in ("", ":memory:") else None


def _is_current(database: Path) -> bool:
    """Whether a database was migrated to the end."""
    if not database.exists():
        return False
    with closing(sqlite3.connect(database)) as connection:
        if not connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'alembic_version'").fetchall():
            return False
        found = connection.execute("SELECT version_num FROM alembic_version").fetchall()
    return found == [(version,) for version in _newest_schema()]


def _newest_schema() -> set[str]:
    """What MLflow's migrations end with, read in their files: MLflow takes seconds to import."""
    if (mlflow := find_spec("mlflow")) is None:
        return set()
    scripts = (Path(str(mlflow.origin)).parent / "store" / "db_migrations" / "versions").glob("*.py")
    text = "\n".join(script.read_text(encoding="utf-8") for script in scripts)
    made, followed = (set(re.findall(rf'^{name} = "(\w+)"', text, re.M)) for name in ("revision", "down_revision"))
    return made - followed


def _migrate(database: Path) -> None:
    """Make a database, or bring it to the schema of this MLflow: in a copy, which takes its place when it is whole.

    MLflow's own migrations leave a database that nothing opens when they are interrupted.
    """
    database.parent.mkdir(parents=True, exist_ok=True)
    remove_strays(database.parent)
    with replacing(database) as copy:
        _copy_migrated(database, copy)


def _copy_migrated(database: Path, copy: Path) -> None:
    """Raises MlflowException for a database that is not whole, of which migrations raise anything."""
    from mlflow.exceptions import MlflowException
    from mlflow.store.db.utils import _initialize_tables, _verify_schema
    from sqlalchemy import create_engine

    if database.exists():
        with closing(sqlite3.connect(database)) as old, closing(sqlite3.connect(copy)) as new:
            old.backup(new)
    engine = create_engine(f"sqlite:///{copy}")
    try:
        _initialize_tables(engine)  # type: ignore[no-untyped-call]
        _verify_schema(engine)  # type: ignore[no-untyped-call]
    except Exception as error:
        raise MlflowException(f"its schema cannot be brought to that of this MLflow: {reason_of(error)}") from error
    finally:
        engine.dispose()


def _experiment(config: Config) -> str:
    """The experiment's id. With the embedded database, artifacts lie beside it, wherever the process was started."""
    import mlflow

    database = _embedded_database(config.tracking.uri)
    location = None if database is None else (database.parent / "artifacts").resolve().as_uri()
    found = mlflow.get_experiment_by_name(config.tracking.experiment)
    if found is None:
        return str(mlflow.create_experiment(config.tracking.experiment, artifact_location=location))
    if database is not None and location is not None and location != found.artifact_location:
        _follow_move(database, str(found.experiment_id), found.artifact_location, location)
    return str(found.experiment_id)


def _follow_move(database: Path, experiment: str, old: str, new: str) -> None:
    """Tell the database where artifacts lie after the project was moved: MLflow keeps absolute paths.

    An experiment whose artifacts somebody keeps elsewhere stays as it is: its runs have no folders beside the database.
    """
    folder, length = database.parent / "artifacts", len(old) + 1
    with closing(sqlite3.connect(database)) as connection, connection:
        runs = connection.execute("SELECT run_uuid FROM runs WHERE experiment_id = ?", (experiment,)).fetchall()
        if not any((folder / run).is_dir() for (run,) in runs):
            return
        connection.execute("UPDATE experiments SET artifact_location = ? WHERE experiment_id = ?", (new, experiment))
        connection.execute(
            "UPDATE runs SET artifact_uri = ? || substr(artifact_uri, ?) "
            "WHERE experiment_id = ? AND substr(artifact_uri, 1, ?) = ?",
            (new, length, experiment, length, f"{old}/"),
        )
