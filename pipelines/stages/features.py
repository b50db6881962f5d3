"""Stage 4: the features of every prompt."""

from __future__ import annotations

import shutil
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
from pipelines.ray.remote_labels import given_to_workers
from pipelines.ray.worker_tasks import FeaturesTask, features_of_batch
from pipelines.run.progress import progress
from pipelines.run.state import check_own, stage_key
from pipelines.run.workspace import Workspace
from pipelines.stages.feature_parts import PART, FeatureParts


def run(config: Config, workers: Workers | None = None) -> Path:
    """Probe the labelled prompts; writes `features.parquet`: columns id, task and one for each set of features.

    What workers found of it is kept in `features/` until the end, and not looked for again.
    """
    workspace = Workspace.of(config)
    check_own(workspace.path("features"), lambda file: file.suffix in (PART, UNFINISHED))
    prompts = workspace.labelled
    with progress("prompts", len(prompts)) as advance:
        if workers is None:
            features = features_of(workspace, prompts, advance)
        else:
            features = _features_on(workers, workspace, prompts, advance)
    columns: dict[str, list[Any]] = {
        "id": [prompt.id for prompt in prompts],
        "task": [prompt.task for prompt in prompts],
        **{name: list(values) for name, values in features.items()},
    }
    path = workspace.path("features.parquet")
    with replacing(path) as unfinished:
        parquet.write_table(pyarrow.table(columns, metadata={"model": workspace.fingerprint}), unfinished)
    shutil.rmtree(workspace.path("features"), ignore_errors=True)
    return path


def features_of(
    workspace: Workspace, prompts: Sequence[Prompt], advance: Callable[[int], None] = lambda done: None
) -> Features:
    """The sets `features.sets` of some prompts, in their order, read from the model as it came."""
    (model, tokenizer), config = workspace.backbone, workspace.config
    found: list[Features] = []
    for rows in _batches(prompts, config.features.batch_size):
        texts = [prompts[row].prompt for row in rows]
        found.append(features_of_batch(model, tokenizer, texts, config.menu.probe_depth, config.features.sets))
        advance(len(rows))
    return _in_order(prompts, config, found)


def _features_on(
    workers: Workers, workspace: Workspace, prompts: Sequence[Prompt], advance: Callable[[int], None]
) -> Features:
    """As `features_of`, by workers, in the same batches."""
    config = workspace.config
    batches = [[prompts[row].prompt for row in rows] for rows in _batches(prompts, config.features.batch_size)]
    task = FeaturesTask(*given_to_workers(workspace), config.menu.probe_depth, config.features.sets)
    parts = FeatureParts(workspace.path("features") / stage_key(config, "features"))
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
