"""Answer a file of prompts."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from oracle.prompts import PromptError, read_jsonl
from runtime.allocator import Allocator
from runtime.texts import generate_texts


def generate_file(
    allocator: Allocator,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Path,
    out: Path | None,
    batch_size: int,
) -> None:
    """Write, for each line of a JSONL file, a line with id, prompt, answer, layers and plan, in the same order.

    Raises:
        PromptError: no such file, or a line without a prompt.
    """
    rows = _read(prompts)
    target = out.open("w") if out else nullcontext(sys.stdout)
    with target as file:
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            answers = generate_texts(allocator, model, tokenizer, [row["prompt"] for row in batch], allocator.decoding)
            for row, answer in zip(batch, answers, strict=True):
                line = {"answer": answer.text, "layers": answer.plan.layers, "plan": str(answer.plan)}
                file.write(json.dumps({"id": row["id"], "prompt": row["prompt"], **line}, ensure_ascii=False) + "\n")


def _read(path: Path) -> list[dict[str, str]]:
    rows = []
    for number, (place, row) in enumerate(read_jsonl(path), 1):
        text = row.get("prompt")
        if not isinstance(text, str) or not text.strip():
            raise PromptError(f"{place}: the prompt is missing or empty")
        rows.append({"id": str(row.get("id", number)), "prompt": text})
    return rows
