"""An allocator for a model that is loaded already: the same stages as the command line."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from backbone.errors import InputError
from backbone.families import family_of
from backbone.files import write_atomically
from pipelines.config import checked_config
from pipelines.proposal import propose
from pipelines.proposal_inputs import AskedModel
from pipelines.run.runner import run_all
from pipelines.run.state import RunState
from pipelines.run.workspace import Workspace
from runtime.allocator import Allocator

IN_MEMORY = "model-in-memory"
"""Stands for the source of a model that was loaded from nowhere."""
PROMPTS = "prompts.jsonl"


class TrainingError(InputError):
    """Arguments of `train` that cannot be used."""


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Iterable[Mapping[str, Any]],
    judge: str | Callable[[str, str, str], float] = "exact",
    keep: float = 0.97,
    folder: str | Path = "runs/mine",
    settings: Sequence[str] = (),
) -> Allocator:
    """Make an allocator for a loaded model. Called again it goes on, or does again what other arguments change.

    Args:
        model: of a supported family. It is left without healing parts, as it was given.
        tokenizer: its own.
        prompts: at least 64 rows with `prompt` or `messages`, and `reference` where the judge needs one; perhaps `id`,
            `task`, `group` and `judge`. A list of dicts or a `datasets.Dataset`.
        judge: of rows that name none: a name as in a file of prompts, or a function `(answer, reference, full model's
            answer) -> score` that its module holds under its own name.
        keep: share of the full model's mean score to certify.
        folder: of the run: all that the command line leaves there, and the prompts.
        settings: `key=value` over the configuration that `layerbudget init` would write.

    Raises:
        InputError: prompts, settings or a model that cannot be used, or another model's folder.
    """
    folder, source = Path(folder), model.name_or_path or IN_MEMORY
    family_of(model)
    rows = _lines(prompts)
    base = {"name": folder.name, "runs": str(folder.parent), "model": {"source": source, "dtype": _dtype(model)}}
    was_training = model.training
    model.eval()  # type: ignore[no-untyped-call]
    try:
        loaded = model, _padding(tokenizer)
        _write(folder, rows, base)
        asked = AskedModel(source, loaded=loaded)
        proposal = propose(asked, str(folder / PROMPTS), judge=_judge_name(judge), keep=keep)
        run_all(checked_config({**proposal.values, **base}, settings), loaded)
        allocator = Allocator.from_pretrained(folder / "allocator")
        allocator.check_model(model)
        return allocator
    finally:
        model.train(was_training)


def _lines(prompts: Iterable[Mapping[str, Any]]) -> str:
    lines = []
    for number, row in enumerate(prompts, 1):
        if not isinstance(row, Mapping):
            raise TrainingError(f"prompt {number} should be a dict with prompt or messages, got {row!r:.80}")
        try:
            lines.append(json.dumps(dict(row)) + "\n")
        except (TypeError, ValueError) as error:
            raise TrainingError(f"prompt {number} holds what is neither text nor number: {error}") from None
    return "".join(lines)


def _dtype(model: PreTrainedModel) -> str:
    return str(model.dtype).removeprefix("torch.")


def _padding(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer as `load_backbone` sets it; the caller's own stays as it is."""
    padding = copy.copy(tokenizer)
    padding.padding_side = "left"
    if padding.pad_token is None:
        padding.pad_token = padding.eos_token
    if padding.pad_token is None:
        raise TrainingError("the tokenizer has neither a padding token nor an end of text; set tokenizer.pad_token")
    return padding


def _write(folder: Path, lines: str, base: dict[str, Any]) -> None:
    """The prompts, in a folder that is found to be this run's first."""
    workspace = Workspace(config := checked_config(dict(base)))
    state = RunState(workspace)
    config.folder.mkdir(parents=True, exist_ok=True)
    state.begin()
    path = folder / PROMPTS
    if not path.is_file() or path.read_text(encoding="utf-8") != lines:
        write_atomically(path, lines)


def _judge_name(judge: str | Callable[[str, str, str], float]) -> str:
    """The name by which labels know a judge."""
    if isinstance(judge, str):
        return judge
    name, module = getattr(judge, "__name__", ""), getattr(judge, "__module__", "")
    if getattr(sys.modules.get(module), name, None) is not judge:
        raise TrainingError(
            f"the judge {judge!r:.80} is not found under its name in a module; define it there with def, since labels "
            "and saved runs know a judge as module:function"
        )
    return f"{module}:{name}"
