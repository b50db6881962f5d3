"""Shared fixtures: nothing here or in any test uses the network."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
import yaml
from tiny import tiny_model, tiny_tokenizer
from tiny_run import tiny_settings, write_prompts
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
    return write_prompts(tmp_path / "prompts.jsonl")


@pytest.fixture(scope="session")
def give_store(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], None]:
    """Gives a project its database of MLflow, unless it has one: a copy, since MLflow takes seconds to make one."""
    from mlflow import MlflowClient

    folder = tmp_path_factory.mktemp("tracking")
    MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db").search_experiments()

    def give(project: Path) -> None:
        (project / "mlruns").mkdir(exist_ok=True)
        if not (project / "mlruns" / "mlflow.db").exists():
            shutil.copy(folder / "mlflow.db", project / "mlruns")

    return give


@pytest.fixture
def config_file(
    tmp_path: Path, model_folder: Path, prompts_file: Path, give_store: Callable[[Path], None]
) -> Callable[..., Path]:
    """Writes a configuration of a run that takes seconds; keyword arguments replace whole sections."""

    def write(file: str = "tiny.yaml", **sections: object) -> Path:
        give_store(tmp_path)
        path = tmp_path / file
        path.write_text(yaml.safe_dump({**tiny_settings(tmp_path, model_folder, prompts_file), **sections}))
        return path

    return write
