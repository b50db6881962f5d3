"""Rows of prompts from any source: JSONL, JSON, CSV and TSV files, gzipped or not, and data sets."""

from __future__ import annotations

import csv
import gzip
import io
import os
import sys
import zlib
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from backbone import strict_json
from backbone.errors import InputError, reason_of

EMBEDDED, FOLDER = "embedded", Path(__file__).with_name("workload")
EXAMPLES = (6, 10)
"""The sizes of the sets of worked examples of an embedded kind of prompts, taken in turn."""

ENDINGS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")


class PromptError(InputError):
    """Prompts that cannot be used; the message names the place and what would be right."""


Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Source:
    """What a file or data set holds.

    Attributes:
        where: its name in messages.
        name: what rows without id or task are named after.
        rows: place in the source, and the row, or the reason why it cannot be read.
        unjudged: what to say where rows name no judge and the configuration names none either; empty for the usual.
    """

    where: str
    name: str
    rows: list[tuple[str, Row | PromptError]]
    unjudged: str = ""

    @property
    def columns(self) -> list[str]:
        return list(dict.fromkeys(name for _, row in self.rows if not isinstance(row, PromptError) for name in row))


def expanded(path: str | Path) -> Path:
    """The path with `~` replaced by the home folder."""
    return Path(os.path.expanduser(path))  # noqa: PTH111 - Path's own raises for the home folder of nobody


def is_file_name(source: str) -> bool:
    """Whether a source is a file by its ending; a folder is a data set, whatever its name."""
    return _ending(source) in ENDINGS and not expanded(source).is_dir()


def read_file(path: Path, wanted: Collection[str]) -> Source:
    """The rows of a file of prompts.

    Args:
        path: ends in one of ENDINGS, perhaps followed by `.gz`; with another ending it is read as JSONL.
        wanted: columns one of which a CSV file has; they tell which character separates its columns.

    Raises:
        PromptError: no such file, or one that cannot be read as a whole.
    """
    path = expanded(path)
    if not path.is_file():
        raise PromptError(f"no prompts file {path}")
    text, ending, name = _text_of(path), _ending(path.name), PurePath(_unpacked(path.name)).stem
    if ending in (".csv", ".tsv"):
        return Source(str(path), name, _csv_rows(path, text, wanted))
    return Source(str(path), name, _json_rows(path, text) if ending == ".json" else _jsonl_rows(text))


def read_dataset(source: str, split: str) -> Source:
    """The rows of what `datasets.load_dataset` takes. Raises PromptError where it takes no such thing."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        dataset = load_dataset(source, split=split)
    except (OSError, ValueError, DatasetsError) as error:
        reason = reason_of(error.__cause__ or error)
        raise PromptError(
            f"cannot read prompts from {source!r}: it is neither a file that ends in {', '.join(ENDINGS)} (or .gz "
            f"after that) nor a data set ({reason})"
        ) from None
    return Source(source, PurePath(source).name, [(f"row {i}", dict(row)) for i, row in enumerate(dataset, 1)])


def _unpacked(name: str) -> str:
    return name[:-3] if name.lower().endswith(".gz") else name


def _ending(name: str) -> str:
    return PurePath(_unpacked(name)).suffix.lower()


def _text_of(path: Path) -> str:
    content = path.read_bytes()
    if path.suffix.lower() == ".gz":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise PromptError(f"{path} cannot be unpacked ({reason_of(error)}); pack the file again") from None
    try:
        return content.decode("utf-8-sig")  # some editors begin a file with a byte order mark
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise PromptError(
            f"{path}, line {line}: the byte {content[error.start]:#04x} is not UTF-8; save the file in that encoding"
        ) from None


def _jsonl_rows(text: str) -> list[tuple[str, Row | PromptError]]:
    """A row for each line; only a newline ends one, whatever stands inside a text."""
    lines = text.split("\n")
    if lines[-1] == "":
        lines.pop()
    return [(f"line {number}", _object(line)) for number, line in enumerate(lines, 1)]


def _object(line: str) -> Row | PromptError:
    try:
        row = strict_json.parse(line)
    except strict_json.NotJSONError as error:
        return PromptError(f"not JSON ({error})")
    return _as_row(row)


def _as_row(row: Any) -> Row | PromptError:
    return row if isinstance(row, dict) else PromptError(f"expected an object, got {type(row).__name__}")


def _json_rows(path: Path, text: str) -> list[tuple[str, Row | PromptError]]:
    try:
        data = strict_json.parse(text)
    except strict_json.NotJSONError as error:
        raise PromptError(
            f"{path}: not JSON ({error}); prompts with one object a line belong into a .jsonl file"
        ) from None
    if not isinstance(data, list):
        raise PromptError(f"{path} should hold a list of objects, one for each prompt")
    return [(f"prompt {number}", _as_row(row)) for number, row in enumerate(data, 1)]


def _csv_rows(path: Path, text: str, wanted: Collection[str]) -> list[tuple[str, Row | PromptError]]:
    with _fields_of_any_length():
        names, delimiter = _header(text, wanted, "\t,;|" if _ending(path.name) == ".tsv" else ",;\t|")
        if len(set(names)) < len(names):
            raise PromptError(f"{path}: two columns have one name, {max(names, key=names.count)!r}")
        rows = [(f"line {number}", _named(names, line)) for number, line in _lines(text, delimiter)]
    return rows[1:]


def _named(names: list[str], line: list[str] | PromptError) -> Row | PromptError:
    if isinstance(line, PromptError):
        return line
    if len(line) != len(names):
        return PromptError(f"{len(line)} values for {len(names)} columns")
    return dict(zip(names, line, strict=True))


def _header(text: str, wanted: Collection[str], delimiters: str) -> tuple[list[str], str]:
    """Names of the columns, and what separates them: the character that gives one of these names, or most names."""
    found = []
    for delimiter in delimiters:
        _, line = next(_lines(text, delimiter), (1, []))
        names = [] if isinstance(line, PromptError) else [name.strip() for name in line]
        found.append((not set(names).isdisjoint(wanted), len(names), names, delimiter))
    _, _, names, delimiter = max(found, key=lambda one: one[:2])
    return names, delimiter


def _lines(text: str, delimiter: str) -> Iterator[tuple[int, list[str] | PromptError]]:
    """Number of the line where a row ends, and its values; nothing after a row that is not CSV."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        for line in reader:
            if line:
                yield reader.line_num, line
    except csv.Error as error:
        yield reader.line_num, PromptError(f"not CSV ({error})")


@contextmanager
def _fields_of_any_length() -> Iterator[None]:
    before = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def embedded_prompts() -> list[dict[str, str]]:
    """The project's own prompts: kinds of short questions, each asked after worked examples, as rows.

    A kind is a hand-written table in `workload/KIND.tsv`: a line with the instruction, a line with the names of the two
    fields, then rows of a text and its answer. The first rows are the worked examples; every other row is a prompt.
    """
    return [row for path in sorted(FOLDER.glob("*.tsv")) for row in _prompts(path)]


def _prompts(path: Path) -> Iterator[dict[str, str]]:
    instruction, fields, *rows = path.read_text(encoding="utf-8").splitlines()
    names = fields.split("\t")
    shown = [_asked(names, *row.split("\t")) for row in rows]
    sets = [shown[sum(EXAMPLES[:i]) :][:size] for i, size in enumerate(EXAMPLES)]
    for number, (asked, answer) in enumerate(shown[sum(EXAMPLES) :]):
        examples = [f"{question} {right}" for question, right in sets[number % len(sets)]]
        yield {
            "id": f"{path.stem}-{number:03d}",
            "task": path.stem,
            "prompt": "\n\n".join([instruction, *examples, asked]),
            "reference": answer,
            "judge": "exact",
        }


def _asked(names: list[str], text: str, answer: str) -> tuple[str, str]:
    return f"{names[0]}: {text}\n{names[1]}:", answer
