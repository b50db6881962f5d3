"""What MLflow is told of a finished run: tags, parameters, headline metrics, the prompts, and when it began."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.config import Config

if TYPE_CHECKING:
    from mlflow.data.dataset import Dataset

HEADLINES = {
    "quality": ("{best}", "quality"),
    "quality_ratio": ("{best}", "quality_ratio"),
    "budget": ("{best}", "budget"),
    "layers": ("{best}", "layers"),
    "tokens_per_s": ("{best}", "tokens_per_s"),
    "full.quality": ("full", "quality"),
    "full.tokens_per_s": ("full", "tokens_per_s"),
    "best_static.quality_ratio": ("best_static", "quality_ratio"),
    "best_static.budget": ("best_static", "budget"),
    "oracle.budget": ("oracle", "budget"),
    "captured_headroom": ("captured_headroom",),
    "speedup_single": ("speed", "speedup_single"),
    "speedup_batch": ("speed", "speedup_batch"),
    "overhead_ms": ("overhead_ms",),
    "certificate.observed_risk": ("certificate", "observed_risk"),
    "labelling.seconds": ("labelling", "seconds"),
}
"""Metric -> where it lies in metrics.json; `{best}` is the best controller. All others are in the artifact."""
ARTIFACTS = ("config.yaml", "metrics.json", "report.html", "tuning.json")


def headlines(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The metrics by which runs are compared, those that were measured."""
    found: dict[str, float] = {}
    for name, path in HEADLINES.items():
        value: Any = metrics
        for key in path:
            value = value[key.format(best=metrics["best"])]
        if value is not None:
            found[name] = float(value)
    return found


def tags(config: Config, metrics: Mapping[str, Any]) -> dict[str, str]:
    """By what runs are found: `tags.certified = 'true' and tags.judge = 'exact'`."""
    return {
        "model": config.model.source,
        "controller": metrics["best"],
        "judge": ", ".join(sorted(metrics["judges"])),
        "certified": "false" if metrics["certificate"]["price"] is None else "true",
    }


def parameters(config: Config, tuning: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration, and as `winner.*` the settings of the best controller."""
    winner = tuning["controllers"][tuning["best"]]["settings"]
    settings = {"controller": winner["name"], "sets": winner["sets"], "components": winner["components"]}
    return dict(_flat({**config.model_dump(mode="json"), "winner": settings | winner["parameters"]}))


def prompts_input(config: Config) -> Dataset:
    """The prompts as an input of the run: where they lie, and for a file the hash of its content."""
    from mlflow.data.code_dataset_source import CodeDatasetSource
    from mlflow.data.dataset_source import DatasetSource
    from mlflow.data.meta_dataset import MetaDataset
    from mlflow.data.sources import LocalArtifactDatasetSource  # type: ignore[attr-defined]  # made when imported

    path = Path(config.data.path).expanduser()
    source: DatasetSource = CodeDatasetSource({"source": config.data.path})
    digest = None
    if path.is_file():
        source = LocalArtifactDatasetSource(path.resolve().as_uri())
        digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    return MetaDataset(source, name=path.name, digest=digest)  # type: ignore[abstract]  # MLflow leaves `profile` out


def began_ms(folder: Path) -> int:
    """When a run that ends now would have begun, had its stages followed each other; Unix time in milliseconds."""
    stages = json.loads((folder / "run.json").read_text(encoding="utf-8"))["stages"]
    return int(1000 * (time.time() - sum(entry["seconds"] for entry in stages.values())))


def look_at(config: Config) -> list[str]:
    """The commands that show this run beside others, and the trials of its settings where there are some."""
    trials = config.tuning.storage or f"sqlite:///{config.folder / 'tuning.db'}"
    commands = [f"Compare runs:    mlflow ui --backend-store-uri {config.tracking.uri}"]
    if config.tuning.storage or (config.folder / "tuning.db").is_file():
        commands.append(f"Look at trials:  optuna-dashboard {trials}   (pip install optuna-dashboard)")
    return commands


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
