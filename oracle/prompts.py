"""The prompts of a run: read, checked, and split once by a hash of their ids."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from backbone import strict_json
from backbone.errors import InputError, reason_of
from oracle.chat import ChatError, ChatTemplate, Message, Question, Rendered, rendered
from oracle.embedded_prompts import embedded_prompts
from oracle.judges import check_judge
from oracle.prompt_tables import ENDINGS, Rows, TableError, rows_of_table

EMBEDDED = "embedded"
FIELDS = ("id", "task", "reference", "judge")
"""What each prompt needs beside `prompt` or `messages`."""
COLUMNS = (*FIELDS, "prompt", "messages", "raw")

Split = Literal["adapt", "train", "tune", "calibrate", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
"""What plans and stand-ins are made from, what controllers learn from and are tuned on, what the certificate is made
from, and what nothing has seen. Prompts that plans and stand-ins were fitted on would lose less under them than others
do, and teach controllers to expect that of all."""


class PromptError(InputError):
    """Prompts that cannot be used; the message names the place and what would be right."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt with what it takes to judge an answer to it. Fields as in the JSONL file.

    Attributes:
        prompt: the text that the model is given; empty for `messages` that no template has rendered yet.
        messages: the conversation that `prompt` was rendered from, or is to be.
        template: hash of the chat template that rendered it; empty where none did.
    """

    id: str
    task: str
    prompt: str
    reference: str
    judge: str
    messages: tuple[Message, ...] = ()
    raw: bool = False
    template: str = ""

    @property
    def hash(self) -> str:
        """Of what an answer and its score depend on, apart from model, plan, decoding and judge.

        Of a rendered prompt not its text, but what that was made from: some templates write the day's date.
        """
        parts: list[Any] = [self.prompt, self.reference]
        if self.template:
            parts = [[asdict(message) for message in self.messages], self.reference, self.template]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]

    @property
    def question(self) -> Question:
        return Question(messages=self.messages) if self.messages else Question(self.prompt, raw=self.raw)

    @property
    def shown(self) -> str:
        """The text for people: what was given, without the template."""
        if len(self.messages) == 1:
            return self.messages[0].content
        return "\n".join(f"{turn.role}: {turn.content}" for turn in self.messages) or self.prompt

    def reworded(self, change: Callable[[str], str]) -> Prompt:
        """The same with another text, in a conversation of the last turn; to be rendered again."""
        if not self.messages:
            return replace(self, prompt=change(self.prompt))
        last = Message("user", change(self.messages[-1].content))
        return replace(self, prompt="", messages=(*self.messages[:-1], last), template="")

    def rendered(self, template: ChatTemplate | None) -> Prompt:
        """The same with the text that the model is given; see `oracle.chat.rendered`.

        Raises:
            PromptError: it cannot be rendered.
        """
        question = self.question
        try:
            text = rendered(question, template)
        except ChatError as error:
            raise PromptError(f"the prompt {self.id!r:.80}: {error}") from None
        if template is None or not isinstance(text, Rendered):
            return self
        turns = question.messages or (Message("user", question.text),)
        return replace(self, prompt=text, messages=turns, template=template.hash)


@dataclass(frozen=True, slots=True)
class Shard:
    """One of `of` parts of the prompts, counted from 1, split by the prompts' hashes. Written `3/8`."""

    number: int
    of: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        match = re.fullmatch(r"(\d+)/(\d+)", text)
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            raise PromptError(f"a shard is written NUMBER/OF with numbers from 1, such as 3/8, got {text!r}")
        return cls(int(match[1]), int(match[2]))

    def select(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        return [prompt for prompt in prompts if int(prompt.hash, 16) % self.of == self.number - 1]


def load_prompts(
    source: str,
    *,
    limit: int | None = None,
    columns: Mapping[str, str] | None = None,
    dataset_split: str = "train",
    judge: str | None = None,
    force_judge: str | None = None,
) -> list[Prompt]:
    """The prompts of a source, in its order.

    Args:
        source: `embedded` (the project's own), a `.jsonl`, `.csv` or `.json` file, or a name or folder that
            `datasets.load_dataset` takes.
        limit: keep this many, chosen by a hash of the id, so that a larger limit only adds prompts.
        columns: for a table or data set, our field -> its column; fields not named keep their own names.
        dataset_split: which split of the data set to read.
        judge: the judge of prompts that name none.
        force_judge: the judge of all prompts, whatever they name.

    Raises:
        PromptError: a missing or malformed source, with the line; an empty prompt, a double id, an unknown judge.
    """
    if source == EMBEDDED:
        rows = [(f"{EMBEDDED} prompt {i}", row) for i, row in enumerate(embedded_prompts(), 1)]
    elif source.endswith(".jsonl"):
        rows = read_jsonl(Path(source))
    elif source.endswith(ENDINGS) and not Path(source).is_dir():
        rows = _read_table(Path(source), columns or {})
    else:
        rows = _read_dataset(source, columns or {}, dataset_split)
    default, forced = ({"judge": name} if name else {} for name in (judge, force_judge))
    prompts = _checked((place, {**default, **row, **forced}) for place, row in rows)
    return limited(prompts, limit)


def limited(prompts: list[Prompt], limit: int | None) -> list[Prompt]:
    """So many of the prompts, chosen by a hash of the id, so that a larger limit only adds prompts; None keeps all."""
    if limit is None or limit >= len(prompts):
        return prompts
    kept = set(sorted((p.id for p in prompts), key=lambda name: _uniform("limit", name))[:limit])
    return [p for p in prompts if p.id in kept]


def split_of(prompt: Prompt, shares: Mapping[Split, float]) -> Split:
    """The split of a prompt: a hash of its id, cut by the shares of the splits, in the order of `SPLITS` (sum 1)."""
    position = _uniform("split", prompt.id)
    for split in SPLITS[:-1]:
        position -= shares[split]
        if position < 0:
            return split
    return "test"


def _uniform(salt: str, name: str) -> float:
    return int.from_bytes(hashlib.sha256(f"{salt}:{name}".encode()).digest()[:8], "big") / 2**64


def read_jsonl(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """(place for error messages, row) of each line; only a newline ends one, whatever stands inside a text.

    Raises:
        PromptError: no such file, one that is not UTF-8, or a line that is not an object.
    """
    if not path.is_file():
        raise PromptError(f"no prompts file {path}")
    lines = _text_of(path).split("\n")
    if lines[-1] == "":
        lines.pop()
    return [_row(f"{path}, line {number}", line) for number, line in enumerate(lines, 1)]


def _read_table(path: Path, columns: Mapping[str, str]) -> Rows:
    if not path.is_file():
        raise PromptError(f"no prompts file {path}")
    try:
        return rows_of_table(path, _text_of(path), columns)
    except TableError as error:
        raise PromptError(str(error)) from None


def _text_of(path: Path) -> str:
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")  # some editors begin a file with a byte order mark
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise PromptError(
            f"{path}, line {line}: the byte {content[error.start]:#04x} is not UTF-8; save the file in that encoding"
        ) from None


def _row(place: str, line: str) -> tuple[str, dict[str, Any]]:
    try:
        row = strict_json.parse(line)
    except strict_json.NotJSONError as error:
        raise PromptError(f"{place}: not JSON ({error})") from None
    if not isinstance(row, dict):
        raise PromptError(f"{place}: expected an object, got {type(row).__name__}")
    return place, row


def _read_dataset(source: str, columns: Mapping[str, str], split: str) -> list[tuple[str, dict[str, Any]]]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        dataset = load_dataset(source, split=split)
    except (OSError, ValueError, DatasetsError) as error:
        reason = reason_of(error.__cause__ or error)
        raise PromptError(
            f"cannot read prompts from {source!r}: it is neither a .jsonl file nor a data set ({reason})"
        ) from None
    mapping = {field: columns.get(field, field) for field in COLUMNS if field not in _unasked(columns)}
    if not {"prompt", "messages"} & columns.keys():
        asked = [name for name in ("prompt", "messages") if name in dataset.column_names]
        if len(asked) != 1:
            has = "both the columns 'prompt' and 'messages'" if asked else "no column 'prompt' or 'messages'"
            raise PromptError(f"{source} has {has}; it has {', '.join(dataset.column_names)}: set data.columns")
    rows = []
    for number, entry in enumerate(dataset):
        row = {field: _as_text(entry[column]) for field, column in mapping.items() if column in entry}
        rows.append((f"{source} row {number}", {"id": f"{split}-{number}", "task": source, **row}))
    return rows


def _unasked(columns: Mapping[str, str]) -> set[str]:
    """Of `prompt` and `messages` the one that is not named where the other is."""
    named = {"prompt", "messages"} & columns.keys()
    return {"prompt", "messages"} - named if named else set()


def _as_text(value: Any) -> Any:
    """Numbers become texts; what is missing, or a list, stays for `_checked_row`."""
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def _checked(rows: Iterable[tuple[str, Mapping[str, Any]]]) -> list[Prompt]:
    prompts: list[Prompt] = []
    seen: dict[str, str] = {}
    for place, row in rows:
        prompt = _checked_row(place, row)
        if prompt.id in seen:
            raise PromptError(f"{place}: the id {prompt.id!r} was used before, at {seen[prompt.id]}; ids must differ")
        seen[prompt.id] = place
        prompts.append(prompt)
    if not prompts:
        raise PromptError("there are no prompts in this source")
    return prompts


def _checked_row(place: str, row: Mapping[str, Any]) -> Prompt:
    if missing := [field for field in FIELDS if not isinstance(row.get(field), str)]:
        raise PromptError(
            f"{place}: the field {missing[0]!r} is missing or not a string; each prompt needs {', '.join(FIELDS)} and "
            "prompt or messages"
        )
    question = question_of(place, row)
    try:
        check_judge(row["judge"])
    except ValueError as error:
        raise PromptError(f"{place}: {error}") from None
    given = {field: row[field] for field in FIELDS}
    return Prompt(**given, prompt=question.text, messages=question.messages, raw=question.raw)


def question_of(place: str, row: Mapping[str, Any]) -> Question:
    """What a line of a file asks. Raises PromptError, with the place, for what `Question.of_row` refuses."""
    try:
        return Question.of_row(row)
    except ChatError as error:
        raise PromptError(f"{place}: {error}") from None
