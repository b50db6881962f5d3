"""Answer a file of prompts, resumably, and without replacing another file unasked."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import Timeout
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from backbone.errors import InputError
from backbone.files import lock_of, write_atomically
from backbone.plan import LayerPlan
from oracle.chat import ChatError, Question
from oracle.prompt_sources import expanded
from oracle.prompts import PromptError, check_lengths, questions_of
from runtime.allocator import Allocator
from runtime.offline import AllocatedText, finished_texts
from runtime.saving.allocator_files import content_digest

Key = tuple[str, Question]
"""Id of a prompt, and what it asks."""

Line = dict[str, Any]

ENTRIES = {"answer": str, "layers": float, "plan": str}
"""What a line of answers holds beside what was asked."""


def check_places(prompts: Path, out: Path | None, *, overwrite: bool) -> None:
    """What can be known before anything is computed.

    Raises:
        PromptError: see `oracle.prompts.questions_of`.
        InputError: see `check_out`.
    """
    questions_of(prompts)
    check_out(prompts, out, overwrite=overwrite)


def check_out(prompts: Path, out: Path | None, *, overwrite: bool) -> None:
    """Raises InputError where `out` is something that must not be replaced."""
    if out is None:
        return
    if out.is_symlink():
        raise InputError(f"--out {out} is a symbolic link; name the file itself")
    prompts = expanded(prompts)
    if _are_same(out, prompts):
        raise InputError(f"--out {out} is the file of prompts itself; name another file")
    if out.exists() and not out.is_file():
        raise InputError(f"--out {out} is no regular file; name a new file, or leave it out for the terminal")
    if out.exists() and not overwrite:
        raise InputError(f"--out {out} exists already; name a new file, or add --overwrite to replace it")
    if not out.parent.is_dir() or not os.access(out.parent, os.W_OK):
        raise InputError(f"--out {out} cannot be written: {out.parent} is no folder that can be written to")
    partial = _partial_of(out)
    if partial.is_symlink() or (partial.exists() and not partial.is_file()) or _are_same(partial, prompts):
        raise InputError(f"{partial}, where answers are kept until all are there, is not layerbudget's; move it away")


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
        InputError: see `check_places`; `<out>.partial` is somebody else's, or was begun with another allocator or
            other settings; another process is writing it.
    """
    with answering(allocator, model, tokenizer, prompts, out, "", overwrite, ENTRIES) as run:
        todo = run.todo
        begin(sum(key in run.lines for key in run.keys), len(run.keys))
        texts = [run.texts[key] for key in todo]
        for batch in finished_texts(allocator, model, tokenizer, texts, batch_size=batch_size):
            run.add({todo[index]: _line(answer) for index, answer in batch})
            advance(len(batch))
        check_out(prompts, out, overwrite=overwrite)  # somebody may have put a file there meanwhile
        run.write(out)
        return [LayerPlan.parse(line["plan"], allocator.menu.n_layers) for line in run.found()]


def _line(answer: AllocatedText) -> Line:
    return {"answer": answer.text, "layers": answer.plan.layers, "plan": str(answer.plan)}


@contextmanager
def answering(
    allocator: Allocator,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Path,
    out: Path | None,
    what: str,
    overwrite: bool,
    entries: Mapping[str, type],
) -> Iterator[Answering]:
    """The prompts of a file with the lines that an earlier run has left in `<out>.partial`, for this process alone.

    Args:
        allocator, model, tokenizer, prompts, out, overwrite: see `answer_file`.
        what: is done with the prompts; with the allocator and the dtype it names all that lines depend on.
        entries: what a line holds beside its prompt.

    Raises:
        PromptError, InputError: see `answer_file`.
    """
    check_places(prompts, out, overwrite=overwrite)
    keys = questions_of(prompts)
    texts = _rendered_texts(allocator, model, tokenizer, keys)
    if out is None:
        yield Answering(keys, texts)
        return
    settings = hashlib.sha256(f"{content_digest(allocator)} {model.dtype}".encode()).hexdigest()[:16]
    try:
        lock = lock_of(out).acquire(timeout=0)
    except Timeout:
        raise InputError(f"another process is writing --out {out}; wait for it or name another file") from None
    with lock:
        run = Answering(keys, texts, _partial_of(out), f"{what} {settings}".strip(), entries)
        run.resume(overwrite)
        yield run


def _rendered_texts(
    allocator: Allocator, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, keys: Sequence[Key]
) -> dict[Key, str]:
    """What the model is given for each prompt. Raises PromptError for one that cannot be rendered, or is too long."""
    texts = {}
    for key in keys:
        try:
            texts[key] = allocator.rendered(tokenizer, key[1])
        except ChatError as error:
            raise PromptError(f"the prompt {key[0]!r:.80}: {error}") from None
    named = [(key[0], text) for key, text in texts.items()]
    check_lengths(model, tokenizer, named, allocator.decoding.max_new_tokens)
    return texts


@dataclass
class Answering:
    """The lines so far, kept in a partial file behind a first line that names the settings.

    Attributes:
        keys: the prompts, in order.
        texts: what the model is given for each.
        partial: the file; None where lines go to the terminal.
        lines: of the prompts that are done.
    """

    keys: Sequence[Key]
    texts: Mapping[Key, str]
    partial: Path | None = None
    settings: str = ""
    entries: Mapping[str, type] = field(default_factory=dict)
    lines: dict[Key, Line] = field(default_factory=dict)

    @property
    def todo(self) -> list[Key]:
        """The prompts that have no line yet, each once."""
        return [key for key in dict.fromkeys(self.keys) if key not in self.lines]

    def resume(self, overwrite: bool) -> None:
        """Read the whole lines that are there. A last one that a kill has torn is cut off."""
        assert self.partial is not None
        header = json.dumps({"layerbudget_answers": self.settings}).encode() + b"\n"
        content = self.partial.read_bytes() if self.partial.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        is_begun = bool(whole) or not header.startswith(content)  # a kill may have torn the first line
        try:
            first, *lines = [json.loads(line) for line in whole.split(b"\n")[:-1]] if is_begun else [{}]
            begun_with = first["layerbudget_answers"] if is_begun else None
            found = {(line["id"], Question.of_row(line)): self._checked(line) for line in lines}
        except (ChatError, ValueError, KeyError, TypeError, RecursionError):
            raise InputError(
                f"{self.partial}, where answers are kept until all are there, is not layerbudget's or is damaged; "
                "move it away"
            ) from None
        if begun_with == self.settings:
            os.truncate(self.partial, len(whole))
            self.lines = found
        elif is_begun and not overwrite:
            raise InputError(
                f"{self.partial} was begun with another allocator or other settings; finish it with them, or add "
                "--overwrite to start again"
            )
        else:
            self.partial.write_bytes(header)

    def _checked(self, line: Line) -> Line:
        kinds = {name: type(value) for name, value in line.items() if name not in ("id", "prompt", "messages", "raw")}
        if type(line["id"]) is not str or kinds != self.entries:
            raise ValueError("a line with other entries")
        return line

    def add(self, found: Mapping[Key, Line]) -> None:
        """Keep the lines of some prompts, with what was asked in front."""
        lines = {key: {"id": key[0], **key[1].to_row(), **line} for key, line in found.items()}
        if self.partial is not None:
            with self.partial.open("a", encoding="utf-8") as file:
                file.write("".join(json.dumps(line) + "\n" for line in lines.values()))
        self.lines |= lines

    def found(self) -> list[Line]:
        """A line for each prompt, in order."""
        return [self.lines[key] for key in self.keys]

    def write(self, out: Path | None) -> None:
        """The whole file at once; None for the standard output."""
        # The standard output may have an encoding that lacks some characters; JSON can do without them.
        ascii_only = out is None and (sys.stdout.encoding or "utf-8").lower() != "utf-8"
        text = "".join(json.dumps(line, ensure_ascii=ascii_only) + "\n" for line in self.found())
        if out is None:
            sys.stdout.write(text)
        else:
            write_atomically(out, text)
        if self.partial is not None:
            self.partial.unlink(missing_ok=True)


def _are_same(first: Path, second: Path) -> bool:
    return first.exists() and second.exists() and first.samefile(second)


def _partial_of(out: Path) -> Path:
    return out.with_name(f"{out.name}.partial")
