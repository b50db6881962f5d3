"""Answer a file of prompts; a run that was killed goes on where it stopped, and nobody's file is replaced unasked."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import Timeout
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from backbone.errors import InputError
from backbone.files import lock_of, replacing
from backbone.plan import LayerPlan
from oracle.chat import ChatError, Question
from oracle.context_lengths import check_lengths
from oracle.prompt_sources import expanded
from oracle.prompts import PromptError, questions_of
from runtime.allocator import Allocator
from runtime.offline import finished_texts
from runtime.saving.allocator_files import content_digest
from runtime.texts import AllocatedText

Key = tuple[str, Question]
"""Id of a prompt, and what it asks."""

ENTRIES = {"id": str, "answer": str, "layers": float, "plan": str}
"""What a line of answers holds beside what was asked."""


class AnswersError(InputError):
    """A place where answers cannot be written, or a file of answers that was begun with other settings."""


def check_places(prompts: Path, out: Path | None, *, overwrite: bool) -> None:
    """What can be known before anything is computed.

    Raises:
        PromptError: see `oracle.prompts.questions_of`.
        AnswersError: see `check_out`.
    """
    questions_of(prompts)
    check_out(prompts, out, overwrite=overwrite)


def check_out(prompts: Path, out: Path | None, *, overwrite: bool) -> None:
    """Raises AnswersError where `out` is something that must not be replaced."""
    if out is None:
        return
    if out.is_symlink():
        raise AnswersError(f"--out {out} is a symbolic link; name the file itself")
    prompts = expanded(prompts)
    if _are_same(out, prompts):
        raise AnswersError(f"--out {out} is the file of prompts itself; name another file")
    if out.exists() and not out.is_file():
        raise AnswersError(f"--out {out} is no regular file; name a new file, or leave it out for the terminal")
    if out.exists() and not overwrite:
        raise AnswersError(f"--out {out} exists already; name a new file, or add --overwrite to replace it")
    if not out.parent.is_dir() or not os.access(out.parent, os.W_OK):
        raise AnswersError(f"--out {out} cannot be written: {out.parent} is no folder that can be written to")
    partial = _partial_of(out)
    if partial.is_symlink() or (partial.exists() and not partial.is_file()) or _are_same(partial, prompts):
        raise AnswersError(f"{partial}, where answers are kept until all are there, is not layerbudget's; move it away")


def answer_file(
    allocator: Allocator,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Path,
    out: Path | None,
    *,
    batch_size: int,
    overwrite: bool = False,
    begin: Callable[[int, int], None] = lambda done, total: None,
    advance: Callable[[int], None] = lambda done: None,
) -> list[LayerPlan]:
    """Write, for each row of a file of prompts, a line with id, prompt, answer, layers and plan, in the same order.

    Until all are there, answers lie in the order in which they came in `<out>.partial`, from which the next run goes
    on; then `out` is written as a whole.

    Args:
        allocator, model, tokenizer: what answers.
        batch_size: prompts generated together, at most.
        out: None for the standard output, at the end and without resuming.
        overwrite: `out` may be replaced, and answers that were begun with other settings be dropped.
        begin: called once, with the number of prompts that were answered before and of all.
        advance: called with the number of prompts answered now.

    Returns:
        The plan of each row.

    Raises:
        PromptError: see `oracle.prompts.questions_of`; or a prompt is too long for the model.
        AnswersError: see `check_places`; `<out>.partial` is somebody else's, or was begun with another allocator or
            other settings; another process is writing it.
    """
    check_places(prompts, out, overwrite=overwrite)
    keys = questions_of(prompts)
    texts = rendered_texts(allocator, model, tokenizer, keys)
    with partial_file(out, settings_digest(allocator, model), overwrite, ENTRIES) as partial:
        answers = partial.read() if partial else {}
        todo = [key for key in dict.fromkeys(keys) if key not in answers]
        begin(len(keys) - sum(key not in answers for key in keys), len(keys))
        left = [texts[key] for key in todo]
        for batch in finished_texts(allocator, model, tokenizer, left, batch_size=batch_size):
            lines = {todo[index]: _line(todo[index], answer) for index, answer in batch}
            if partial:
                partial.append(lines.values())
            answers |= lines
            advance(len(lines))
        check_out(prompts, out, overwrite=overwrite)  # somebody may have put a file there meanwhile
        write_lines(out, [answers[key] for key in keys])
        if partial:
            partial.path.unlink(missing_ok=True)
    return [LayerPlan.parse(answers[key]["plan"], allocator.menu.n_layers) for key in keys]


def rendered_texts(
    allocator: Allocator, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, keys: Sequence[Key]
) -> dict[Key, str]:
    """What the model is given for each prompt. Raises PromptError for one that cannot be rendered, or is too long."""
    texts = {key: _rendered(allocator, tokenizer, *key) for key in keys}
    named = [(key[0], text) for key, text in texts.items()]
    check_lengths(model, tokenizer, named, allocator.decoding.max_new_tokens)
    return texts


def _rendered(allocator: Allocator, tokenizer: PreTrainedTokenizerBase, name: str, question: Question) -> str:
    try:
        return allocator.rendered(tokenizer, question)
    except ChatError as error:
        raise PromptError(f"the prompt {name!r:.80}: {error}") from None


def _are_same(first: Path, second: Path) -> bool:
    return first.exists() and second.exists() and first.samefile(second)


def _partial_of(out: Path) -> Path:
    return out.with_name(f"{out.name}.partial")


@contextmanager
def partial_file(
    out: Path | None, settings: str, overwrite: bool, entries: Mapping[str, type]
) -> Iterator[PartialFile | None]:
    """`<out>.partial`, for this process alone; None where answers go to the terminal.

    Args:
        settings: names everything that the lines depend on besides their prompts.
        overwrite: lines that were begun with other settings are dropped.
        entries: what a line holds.

    Raises:
        AnswersError: another process is writing there.
    """
    if out is None:
        yield None
        return
    lock = lock_of(out)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise AnswersError(f"another process is writing --out {out}; wait for it or name another file") from None
    try:
        yield PartialFile(_partial_of(out), settings, overwrite, entries)
    finally:
        lock.release()


class PartialFile:
    """Answers so far, a line each, behind a first line that names the settings."""

    def __init__(self, path: Path, settings: str, overwrite: bool, entries: Mapping[str, type]) -> None:
        self.path, self._settings, self._overwrite, self._entries = path, settings, overwrite, entries

    def read(self) -> dict[Key, dict[str, Any]]:
        """The whole lines that are there. A last one that a kill has torn is cut off."""
        content = self.path.read_bytes() if self.path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        if not whole and _header(self._settings).startswith(content):  # nothing yet, or a first line that a kill tore
            return self._begin()
        try:
            first, *lines = [json.loads(line) for line in whole.split(b"\n")[:-1]]
            begun_with = first["layerbudget_answers"]
            found = {(line["id"], Question.of_row(line)): _whole(line, self._entries) for line in lines}
        except (ChatError, ValueError, KeyError, TypeError, RecursionError):
            raise AnswersError(
                f"{self.path}, where answers are kept until all are there, is not layerbudget's or is damaged; "
                "move it away"
            ) from None
        if begun_with != self._settings and not self._overwrite:
            raise AnswersError(
                f"{self.path} was begun with another allocator or other settings; finish it with them, or add "
                "--overwrite to start again"
            )
        if begun_with != self._settings:
            return self._begin()
        with self.path.open("r+b") as file:
            file.truncate(len(whole))
        return found

    def _begin(self) -> dict[Key, dict[str, Any]]:
        self.path.write_bytes(_header(self._settings))
        return {}

    def append(self, lines: Iterable[dict[str, Any]]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(line) + "\n" for line in lines))


def _header(settings: str) -> bytes:
    return json.dumps({"layerbudget_answers": settings}).encode() + b"\n"


def _whole(line: dict[str, Any], entries: Mapping[str, type]) -> dict[str, Any]:
    """Raises ValueError for a line with other entries."""
    rest = {name: type(value) for name, value in line.items() if name not in ("prompt", "messages", "raw")}
    if rest != entries:
        raise ValueError("a line with other entries")
    return line


def _line(key: Key, answer: AllocatedText) -> dict[str, Any]:
    return {
        "id": key[0],
        **key[1].to_row(),
        "answer": answer.text,
        "layers": answer.plan.layers,
        "plan": str(answer.plan),
    }


def settings_digest(allocator: Allocator, model: PreTrainedModel) -> str:
    """A short name for everything that answers depend on besides their prompts."""
    return hashlib.sha256(f"{content_digest(allocator)} {model.dtype}".encode()).hexdigest()[:16]


def write_lines(out: Path | None, lines: Sequence[dict[str, Any]]) -> None:
    """The whole file at once; None for the standard output."""
    # The standard output may have an encoding that lacks some characters; JSON can do without them.
    ascii_only = out is None and (sys.stdout.encoding or "utf-8").lower() != "utf-8"
    text = "".join(json.dumps(line, ensure_ascii=ascii_only) + "\n" for line in lines)
    if out is None:
        sys.stdout.write(text)
        return
    with replacing(out) as unfinished:
        unfinished.write_text(text, encoding="utf-8", newline="\n")
