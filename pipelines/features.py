"""Stage 3: the features of every prompt."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet as parquet

from controller.features import prompt_features
from pipelines.config import Config
from pipelines.progress import progress
from pipelines.workspace import Workspace


def run(config: Config) -> Path:
    """Probe all prompts; writes `features.parquet` with the columns id, task and features."""
    workspace = Workspace.of(config)
    model, tokenizer = workspace.backbone
    prompts, rows = workspace.prompts, []
    ordered = sorted(prompts, key=lambda prompt: -len(prompt.prompt))
    with progress("prompts", len(prompts)) as advance:
        for start in range(0, len(ordered), config.features.batch_size):
            batch = ordered[start : start + config.features.batch_size]
            inputs = tokenizer([prompt.prompt for prompt in batch], return_tensors="pt", padding=True).to(model.device)
            rows.append(prompt_features(model, inputs["input_ids"], inputs["attention_mask"], config.menu.probe_depth))
            advance(len(batch))
    columns = {
        "id": [prompt.id for prompt in ordered],
        "task": [prompt.task for prompt in ordered],
        "features": list(np.concatenate(rows)),
    }
    unfinished = workspace.path(".features.parquet.unfinished")
    parquet.write_table(pyarrow.table(columns), unfinished)
    return unfinished.rename(workspace.path("features.parquet"))
