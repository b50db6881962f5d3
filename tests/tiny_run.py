"""The prompts and the configuration of a run on a tiny model, which takes seconds."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_prompts(path: Path) -> Path:
    """160 prompts of two kinds, judged by agreement with the full model."""
    draw = random.Random(0)
    rows = []
    for number in range(160):
        task = "short" if number % 2 else "long"
        text = "".join(draw.choices("abcdefgh", k=6 if task == "short" else 20))
        rows.append({"id": f"{task}-{number}", "task": task, "prompt": text, "reference": "", "judge": "agreement"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def change_prompts(path: Path, change: Callable[[int, dict[str, Any]], dict[str, Any]]) -> None:
    """Put what `change` makes of a row's number and the row in its place, in a file of prompts."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(change(number, row)) + "\n" for number, row in enumerate(rows)))


def tiny_settings(folder: Path, model: Path, prompts: Path) -> dict[str, Any]:
    """The configuration, with its run and its tracking in `folder`."""
    return {
        "name": "tiny",
        "runs": str(folder / "runs"),
        "model": {"source": str(model), "device": "cpu", "dtype": "float32"},  # bfloat16 rounds as batches fall
        "data": {"path": str(prompts)},
        "decoding": {"max_new_tokens": 3},
        "menu": {"method": "greedy", "probe_depth": 2, "plans": 4, "cheapest_budget": 0.4, "prompts": 6},
        "tuning": {"search_from": 0, "trials": 2, "components": [6], "folds": 2},
        "calibration": {"keep": 0.7, "delta": 0.2},
        "evaluation": {"speed_prompts": 4, "speed_tokens": 3, "speed_rounds": 1},
        "tracking": {"uri": f"sqlite:///{folder}/mlruns/mlflow.db"},
        "try_prompts": ["abcabc", "hgfedcba"],
    }
