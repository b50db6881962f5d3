"""Stage 4: the features of every prompt."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet as parquet

from backbone.execution.shared_prefixes import alike
from backbone.files import UNFINISHED, replacing
from controller.features import Features, rows_of
from oracle.prompts import Prompt
from pipelines.config import Config
from pipelines.ray.distributed import Workers
from pipelines.ray.remote_work import FeaturesTask, features_of_batch, given_to_workers
from pipelines.run.progress import progress
from pipelines.run.state import check_own, stage_key
from pipelines.run.workspace import Workspace

PART = ".npz"


def run(workspace: Workspace, workers: Workers | None = None) -> Path:
    """Probe the labelled prompts; writes `features.parquet`: columns id, task and one for each set of features.

    What workers found of it is kept in `features/` until the end, and not looked for again.
    """
    check_own(workspace.path("features"), lambda file: file.suffix in (PART, UNFINISHED))
    prompts = workspace.prompts.labelled()
    with progress("prompts", len(prompts)) as advance:
        if workers is None:
            features = _features_of(workspace, prompts, advance)
        else:
            features = _features_on(workers, workspace, prompts, advance)
    columns: dict[str, list[Any]] = {
        "id": [prompt.id for prompt in prompts],
        "task": [prompt.task for prompt in prompts],
        **{name: list(values) for name, values in features.items()},
    }
    path, model = workspace.path("features.parquet"), workspace.model.facts.fingerprint
    with replacing(path) as unfinished:
        parquet.write_table(pyarrow.table(columns, metadata={"model": model}), unfinished)
    shutil.rmtree(workspace.path("features"), ignore_errors=True)
    return path


def _features_of(workspace: Workspace, prompts: Sequence[Prompt], advance: Callable[[int], None]) -> Features:
    """The sets `features.sets` of some prompts, in their order, read from the model without healing."""
    loaded, config = workspace.model.loaded, workspace.config
    found: list[Features] = []
    for rows in _batches(prompts, config.features.batch_size):
        texts = [prompts[row].prompt for row in rows]
        found.append(features_of_batch(*loaded, texts, config.menu.probe_depth, config.features.sets))
        advance(len(rows))
    return _in_order(prompts, config, found)


def _features_on(
    workers: Workers, workspace: Workspace, prompts: Sequence[Prompt], advance: Callable[[int], None]
) -> Features:
    """As `_features_of`, by workers, in the same batches."""
    config = workspace.config
    batches = [[prompts[row].prompt for row in rows] for rows in _batches(prompts, config.features.batch_size)]
    task = FeaturesTask(*given_to_workers(workspace), config.menu.probe_depth, config.features.sets)
    parts = FeatureParts(workspace.path("features") / stage_key(workspace, "features"))
    done = parts.numbers()
    missing = [number for number in range(len(batches)) if number not in done]
    advance(len(prompts) - sum(len(batches[number]) for number in missing))
    for place, features in workers.map(task, [batches[number] for number in missing]):
        parts.add(missing[place], features)
        advance(len(batches[missing[place]]))
    return _in_order(prompts, config, parts.all())


def _batches(prompts: Sequence[Prompt], size: int) -> Iterator[np.ndarray]:
    """Rows of prompts that begin alike, of like length, longest first."""
    order = _alike_together(prompts)
    yield from np.array_split(order, range(size, len(order), size))


def _alike_together(prompts: Sequence[Prompt]) -> np.ndarray:
    return np.array([row for group in alike([prompt.prompt for prompt in prompts]) for row in group])


def _in_order(prompts: Sequence[Prompt], config: Config, found: Sequence[Features]) -> Features:
    """The batches' features as one table in the order of the prompts."""
    joined = {name: np.concatenate([features[name] for features in found]) for name in config.features.sets}
    return rows_of(joined, _alike_together(prompts).argsort())


class FeatureParts:
    """Features of single batches, `NUMBER.npz` in a folder; each is there as a whole or not at all."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def numbers(self) -> set[int]:
        """The batches whose features are there; those of a damaged file are not."""
        return {int(path.stem) for path in self._folder.glob(f"*{PART}") if _is_whole(path)}

    def add(self, number: int, features: Features) -> None:
        with replacing(self._folder / f"{number}{PART}") as unfinished, unfinished.open("wb") as file:
            np.savez(file, **features)  # type: ignore[arg-type]

    def all(self) -> list[Features]:
        """By number."""
        found = []
        for number in sorted(self.numbers()):
            with np.load(self._folder / f"{number}{PART}", allow_pickle=False) as saved:
                found.append({name: saved[name] for name in saved.files})
        return found


def _is_whole(path: Path) -> bool:
    """Whether a file is an archive whose checksums are right."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (OSError, zipfile.BadZipFile):
        return False
