"""What a run has found, apart from times and dates: what must be equal however often it was disturbed."""

from __future__ import annotations

import hashlib
import json
import re
import sqlite3
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet

from pipelines.config import load_config
from pipelines.run.prompts import IN_FULL
from pipelines.run.workspace import Workspace

VOLATILE = {"seconds", "date", "decision_ms", "created", "save_id"}
"""Keys of results whose values are times."""
DATE = re.compile(r"\d{4}-\d\d-\d\d")
"""A run that goes on after midnight names another day in its sentences."""


def content_of(run: Path) -> dict[str, Any]:
    """Name of each result in a run folder -> what it holds."""
    found = {name: _without_times(json.loads((run / name).read_text())) for name in JSON_FILES}
    found["healing.safetensors"] = _digest(run / "healing.safetensors")
    for path in sorted((run / "controllers").rglob("*")):
        if path.is_file():
            found[str(path.relative_to(run))] = _digest(path)
    found["features.parquet"] = parquet.read_table(run / "features.parquet").to_pylist()
    found["labels.db"] = needed(labels_of(run / "labels.db"), labelled_in_full(run))
    found["metrics.json"] = _policies(json.loads((run / "metrics.json").read_text()))
    found["report.html"] = (run / "report.html").read_text().rstrip().endswith("</html>")
    found["allocator"] = sorted(path.name for path in (run / "allocator").iterdir() if not path.name.startswith("."))
    return found


JSON_FILES = ("menu.json", "adapt.json", "tuning.json", "calibration.json", "choices.json")


def needed(labels: set[tuple[Any, ...]], prompts: set[str]) -> set[tuple[Any, ...]]:
    """The labels that controllers learn from; the others (examples, yardsticks, the certificate's) were used up."""
    return {row for row in labels if row[1] in prompts and (" with " in row[0] or row[2] == "0-5")}


def labelled_in_full(run: Path) -> set[str]:
    """Hashes of the prompts that the stage `label` labels."""
    config = load_config(run / "config.yaml", [f"data.path={run.parents[1] / 'prompts.jsonl'}"])
    return {prompt.hash for prompt in Workspace(config).prompts.labelled(*IN_FULL)}


def labels_of(path: Path) -> set[tuple[Any, ...]]:
    """Each label with its answer and score; none of a file that cannot be read."""
    connection = sqlite3.connect(path)
    try:
        query = "SELECT model, prompt, plan, decoding, judge, answer, answer_ids, score FROM labels"
        return set(connection.execute(query))
    except sqlite3.DatabaseError:
        return set()
    finally:
        connection.close()


def _policies(metrics: dict[str, Any]) -> dict[str, Any]:
    """Quality and budget of each policy."""
    return {
        name: {key: card[key] for key in ("quality", "budget", "layers")}
        for name, card in metrics.items()
        if isinstance(card, dict) and "quality_ratio" in card
    }


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_times(item) for key, item in value.items() if key not in VOLATILE}
    if isinstance(value, str):
        return DATE.sub("", value)
    return [_without_times(item) for item in value] if isinstance(value, list) else value


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
