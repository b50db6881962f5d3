"""Every finished run in MLflow: parameters, metrics, figures, and the saved allocator."""

from __future__ import annotations

import json
import logging
import os
import socket
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from backbone.errors import reason_of
from pipelines.config import Config, ConfigError

ANSWER_SECONDS = 5
PORTS = {"http": 80, "https": 443, "postgresql": 5432, "mysql": 3306, "mssql": 1433}
"""Where servers listen whose URI names no port."""


def log_run(config: Config, metrics: Mapping[str, Any], figures: Mapping[str, str], folder: Path) -> None:
    """Log one run to `tracking.uri`.

    Args:
        config: of the run.
        metrics: nested; numbers become metrics named by their path.
        figures: name -> SVG text.
        folder: the run folder, of which the allocator, the configuration, the metrics and the report are kept.

    Raises:
        ConfigError: the tracking store cannot be used.
    """
    logging.getLogger("alembic").setLevel(logging.WARNING)
    check_answers("tracking.uri", config.tracking.uri)
    with _store_usable(config.tracking.uri):
        import mlflow

        mlflow.set_tracking_uri(config.tracking.uri)
        with mlflow.start_run(experiment_id=_experiment(config), run_name=config.name):
            mlflow.log_params(dict(_flat(config.model_dump(mode="json"))))
            numbers = {key: float(value) for key, value in _flat(metrics) if isinstance(value, int | float)}
            mlflow.log_metrics(numbers)
            for key, value, step in _training(json.loads((folder / "adapt.json").read_text())):
                mlflow.log_metric(key, value, step=step)
            for name, text in figures.items():
                mlflow.log_text(text, f"figures/{name}.svg")
            for name in ("config.yaml", "metrics.json", "report.html"):
                mlflow.log_artifact(str(folder / name))
            mlflow.log_artifacts(str(folder / "allocator"), "allocator")


def check_answers(key: str, uri: str) -> None:
    """Whether the server that a setting names, if any, answers within `ANSWER_SECONDS`. Libraries try for minutes.

    Raises:
        ConfigError: it does not.
    """
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
    """Whether MLflow knows a store like this, and can open it. An embedded database is made when a run is logged, so
    nothing is asked about it: MLflow takes seconds to import.

    Raises:
        ConfigError: the tracking store cannot be used.
    """
    if _embedded_database(uri) is not None:
        return
    check_answers("tracking.uri", uri)
    with _store_usable(uri):
        from mlflow import MlflowClient

        MlflowClient(tracking_uri=uri)


@contextmanager
def _store_usable(uri: str) -> Iterator[None]:
    """What MLflow cannot do with its store, in one sentence."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, SQLAlchemyError, ImportError, OSError) as error:
        reason = reason_of(error)
        raise ConfigError(f"cannot log to tracking.uri {uri!r}: {reason}") from error


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


def _embedded_database(uri: str) -> Path | None:
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def _follow_move(database: Path, experiment: str, old: str, new: str) -> None:
    """After the project was moved or copied, artifacts are where they lie now: MLflow keeps absolute places, and has no
    call that changes them, so the database is told. An experiment whose artifacts somebody keeps elsewhere stays as it
    is: its runs have no folders beside the database."""
    folder = database.parent / "artifacts"
    with closing(sqlite3.connect(database)) as connection, connection:
        runs = [
            run for (run,) in connection.execute("SELECT run_uuid FROM runs WHERE experiment_id = ?", (experiment,))
        ]
        if not any((folder / run).is_dir() for run in runs):
            return
        connection.execute("UPDATE experiments SET artifact_location = ? WHERE experiment_id = ?", (new, experiment))
        connection.execute(
            "UPDATE runs SET artifact_uri = ? || substr(artifact_uri, ?) "
            "WHERE experiment_id = ? AND substr(artifact_uri, 1, ?) = ?",
            (new, len(old) + 1, experiment, len(old) + 1, f"{old}/"),
        )


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


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    flat: list[tuple[str, Any]] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat += _flat(value, f"{prefix}{key}.")
        else:
            flat.append((f"{prefix}{key}", value))
    return flat
