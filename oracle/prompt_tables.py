"""Prompts in a single CSV or JSON file: rows with columns, read without any further library."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from backbone import strict_json

ENDINGS = (".csv", ".json")
Rows = list[tuple[str, dict[str, Any]]]
"""(place for error messages, row)."""


class TableError(ValueError):
    """A file that holds no table; the message says what was wrong."""


def rows_of_table(path: Path, text: str, columns: Mapping[str, str]) -> Rows:
    """The rows of a file, with our names for its columns; `id` and `task`, where it has none, are row and file name.

    Args:
        path: of the file, for its ending and for messages.
        text: its content: CSV whose first line names the columns, or JSON, a list of objects.
        columns: our field -> the file's column; fields not named keep their own names.

    Raises:
        TableError: not such a file, or a column that it does not have.
    """
    rows = _csv_rows(path, text) if path.suffix == ".csv" else _json_rows(path, text)
    known = list(dict.fromkeys(name for _, row in rows for name in row))
    if missing := [column for column in columns.values() if column not in known]:
        raise TableError(f"{path} has no column {missing[0]!r}; it has {', '.join(known)}: set data.columns")
    if not {"prompt", "messages"} & {*columns, *known}:
        raise TableError(f"{path} has no column 'prompt'; it has {', '.join(known)}: set data.columns")
    return [(place, _named(path, number, row, columns)) for number, (place, row) in enumerate(rows, 1)]


def _named(path: Path, number: int, row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    own = {**row, **{field: row.get(column) for field, column in columns.items()}}
    texts = {name: str(value) if type(value) in (int, float) else value for name, value in own.items()}
    return {"id": f"{path.stem}-{number}", "task": path.stem, **texts}


def _csv_rows(path: Path, text: str) -> Rows:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        lines = [(reader.line_num, line) for line in reader if line]
    except csv.Error as error:
        raise TableError(f"{path}, line {reader.line_num}: not CSV ({error})") from None
    names = lines[0][1] if lines else []
    if len(set(names)) < len(names):
        raise TableError(f"{path}: two columns have one name, {max(names, key=names.count)!r}")
    for number, line in lines:
        if len(line) != len(names):
            raise TableError(f"{path}, line {number}: {len(line)} values for {len(names)} columns")
    return [(f"{path}, line {number}", dict(zip(names, line, strict=True))) for number, line in lines[1:]]


def _json_rows(path: Path, text: str) -> Rows:
    try:
        data = strict_json.parse(text)
    except strict_json.NotJSONError as error:
        raise TableError(
            f"{path}: not JSON ({error}); prompts with one object a line belong into a .jsonl file"
        ) from None
    if not isinstance(data, list) or not all(isinstance(row, dict) for row in data):
        raise TableError(f"{path} should hold a list of objects, one for each prompt")
    return [(f"{path}, prompt {number}", row) for number, row in enumerate(data, 1)]
