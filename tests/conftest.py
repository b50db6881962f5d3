"""Shared fixtures: nothing here or in any test uses the network."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
import yaml
from tiny import tiny_model, tiny_tokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerFast

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def model() -> PreTrainedModel:
    return tiny_model("llama")


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny model whose layers change little, so that some prompts keep their answers under short plans."""
    folder = tmp_path_factory.mktemp("model")
    tiny_model("llama", layer_scale=0.5).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def prompts_file(tmp_path: Path) -> Path:
    """160 prompts of two kinds, judged by agreement with the full model."""
    path = tmp_path / "prompts.jsonl"
    draw = random.Random(0)
    rows = []
    for number in range(160):
        task = "short" if number % 2 else "long"
        text = "".join(draw.choices("abcdefgh", k=6 if task == "short" else 20))
        rows.append({"id": f"{task}-{number}", "task": task, "prompt": text, "reference": "", "judge": "agreement"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def config_file(tmp_path: Path, model_folder: Path, prompts_file: Path) -> Callable[..., Path]:
    """Writes a configuration of a run that takes seconds; keyword arguments replace whole sections."""

    def write(file: str = "tiny.yaml", **sections: object) -> Path:
        config = {
            "name": "tiny",
            "runs": str(tmp_path / "runs"),
            "model": {"source": str(model_folder), "device": "cpu"},
            "data": {"path": str(prompts_file)},
            "decoding": {"max_new_tokens": 3},
            "menu": {"method": "greedy_layers", "probe_depth": 2, "plans": 4, "cheapest_budget": 0.4, "prompts": 6},
            "tuning": {"trials": 2, "components": [6], "folds": 2},
            "calibration": {"alpha": 0.3, "delta": 0.2},
            "evaluation": {"speed_prompts": 4, "speed_tokens": 3, "speed_rounds": 1},
            "tracking": {"uri": f"sqlite:///{tmp_path}/mlruns/mlflow.db"},
            "try_prompts": ["abcabc", "hgfedcba"],
        }
        path = tmp_path / file
        path.write_text(yaml.safe_dump({**config, **sections}))
        return path

    return write
