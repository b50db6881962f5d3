"""Answer a file of prompts; a run that was killed goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from backbone.errors import InputError
from oracle.prompts import PromptError, read_jsonl
from runtime.allocator import Allocator
from runtime.offline import finished_texts
from runtime.texts import AllocatedText

Key = tuple[str, str]
"""Id and prompt of a line."""


class AnswersError(InputError):
    """A file of answers that was begun with other settings."""


def answer_file(
    allocator: Allocator,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Path,
    out: Path | None,
    *,
    batch_size: int,
    begin: Callable[[int, int], None] = lambda done, total: None,
    advance: Callable[[int], None] = lambda done: None,
) -> None:
    """Write, for each line of a JSONL file, a line with id, prompt, answer, layers and plan, in the same order.

    Until all are there, answers lie in the order in which they came in `<out>.partial`, from which the next run goes
    on; then `out` is replaced as a whole.

    Args:
        out: None for the standard output, at the end and without resuming.
        begin: called once, with the number of prompts that were answered before and of all.
        advance: called with the number of prompts answered now.

    Raises:
        PromptError: no such file, or a line without a prompt.
        AnswersError: `<out>.partial` was begun with another allocator or other settings.
    """
    keys = _read(prompts)
    partial = _Partial(out.with_name(f"{out.name}.partial"), _settings(allocator)) if out else None
    answers: dict[Key, dict[str, Any]] = partial.read() if partial else {}
    todo = [key for key in dict.fromkeys(keys) if key not in answers]
    begin(len(keys) - sum(key not in answers for key in keys), len(keys))
    texts = [prompt for _, prompt in todo]
    for batch in finished_texts(allocator, model, tokenizer, texts, batch_size=batch_size):
        lines = {todo[index]: _line(todo[index], answer) for index, answer in batch}
        if partial:
            partial.append(lines.values())
        answers |= lines
        advance(len(lines))
    whole = "".join(json.dumps(answers[key], ensure_ascii=False) + "\n" for key in keys)
    if out is None or partial is None:
        sys.stdout.write(whole)
    else:
        _replace(out, whole)
        partial.path.unlink(missing_ok=True)


class _Partial:
    """Answers so far, a line each, behind a first line that names the settings."""

    def __init__(self, path: Path, settings: str) -> None:
        self.path, self._settings = path, settings

    def read(self) -> dict[Key, dict[str, Any]]:
        """The whole lines that are there. A last one that a kill has torn is cut off."""
        if not self.path.exists() or b"\n" not in (content := self.path.read_bytes()):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps({"settings": self._settings}) + "\n")
            return {}
        content = content[: content.rindex(b"\n") + 1]
        try:
            first, *lines = [json.loads(line) for line in content.splitlines()]
            if first["settings"] != self._settings:
                raise AnswersError(
                    f"{self.path} was begun with another allocator or other settings; finish it with them or delete it"
                )
            found = {(line["id"], line["prompt"]): line for line in lines}
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, InputError):
                raise
            raise AnswersError(f"{self.path} is damaged ({error}); delete it to start again") from None
        with self.path.open("r+b") as file:
            file.truncate(len(content))
        return found

    def append(self, lines: Iterable[dict[str, Any]]) -> None:
        with self.path.open("a") as file:
            file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def _line(key: Key, answer: AllocatedText) -> dict[str, Any]:
    return {
        "id": key[0],
        "prompt": key[1],
        "answer": answer.text,
        "layers": answer.plan.layers,
        "plan": str(answer.plan),
    }


def _settings(allocator: Allocator) -> str:
    """A short name for everything that answers depend on besides their prompts."""
    parts = (
        allocator.fingerprint,
        allocator.menu.to_json(),
        allocator.controller_name,
        allocator.certificate.price,
        str(allocator.decoding),
        allocator.stand_ins.digest if allocator.stand_ins else "",
    )
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]


def _replace(path: Path, text: str) -> None:
    fresh = path.with_name(f"{path.name}.new")
    fresh.write_text(text)
    fresh.replace(path)


def _read(path: Path) -> list[Key]:
    rows = []
    for number, (place, row) in enumerate(read_jsonl(path), 1):
        text = row.get("prompt")
        if not isinstance(text, str) or not text.strip():
            raise PromptError(f"{place}: the prompt is missing or empty")
        rows.append((str(row.get("id", number)), text))
    return rows
