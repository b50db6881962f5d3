"""Stage 4: the features of every prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet as parquet

from backbone.files import replacing
from controller.features import Features, prompt_features, rows_of
from oracle.chat import padded_prompts
from oracle.prompts import Prompt
from pipelines.config import Config
from pipelines.progress import progress
from pipelines.workspace import Workspace


def run(config: Config) -> Path:
    """Probe the labelled prompts; writes `features.parquet`: columns id, task and one for each set of features."""
    workspace = Workspace.of(config)
    prompts = workspace.labelled
    with progress("prompts", len(prompts)) as advance:
        features = features_of(workspace, prompts, advance)
    columns: dict[str, list[Any]] = {
        "id": [prompt.id for prompt in prompts],
        "task": [prompt.task for prompt in prompts],
        **{name: list(values) for name, values in features.items()},
    }
    path = workspace.path("features.parquet")
    with replacing(path) as unfinished:
        parquet.write_table(pyarrow.table(columns, metadata={"model": workspace.fingerprint}), unfinished)
    return path


def features_of(
    workspace: Workspace, prompts: Sequence[Prompt], advance: Callable[[int], None] = lambda done: None
) -> Features:
    """The sets `features.sets` of some prompts, in their order, read from the model as it came."""
    (model, tokenizer), config = workspace.backbone, workspace.config
    order = np.array(sorted(range(len(prompts)), key=lambda row: -len(prompts[row].prompt)))
    found: list[Features] = []
    for rows in np.array_split(order, range(config.features.batch_size, len(order), config.features.batch_size)):
        inputs = dict(padded_prompts(tokenizer, [prompts[row].prompt for row in rows]).to(model.device))
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        found.append(prompt_features(model, ids, mask, config.menu.probe_depth, config.features.sets))
        advance(len(rows))
    joined = {name: np.concatenate([features[name] for features in found]) for name in config.features.sets}
    return rows_of(joined, order.argsort())
