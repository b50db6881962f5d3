"""One rule that makes prompts of the rows of any source, and names all rows that it refuses.

Columns are renamed, ids and tasks that are missing are filled in, numbers become texts, empty cells are missing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from backbone import strict_json
from backbone.errors import InputError
from oracle.lm_eval_tasks import is_task, read_task
from oracle.prompt_sources import (
    EMBEDDED,
    PromptError,
    Row,
    Source,
    embedded_prompts,
    expanded,
    is_file_name,
    read_dataset,
    read_file,
)

COLUMNS = ("id", "task", "group", "prompt", "messages", "raw", "reference", "judge")
"""The fields of a row; `data.columns` may name other columns for them."""
ASKED = ("prompt", "messages")
SHOWN = 10
"""Problems of a source that are named; the others are counted."""

T = TypeVar("T")


def read_source(source: str, columns: Mapping[str, str], dataset_split: str) -> Source:
    """The rows of a file, data set or task as they stand there. Raises PromptError for one that cannot be read."""
    if source == EMBEDDED:
        return Source(EMBEDDED, EMBEDDED, [(f"prompt {i}", row) for i, row in enumerate(embedded_prompts(), 1)])
    if is_task(source):
        return read_task(source, dataset_split)
    if not is_file_name(source):
        return read_dataset(str(expanded(source)) if source.startswith("~") else source, dataset_split)
    return read_file(Path(source), [columns.get(name, name) for name in ASKED])


def prompts_from(source: Source, columns: Mapping[str, str], make: Callable[[Row], T]) -> list[T]:
    """What `make` makes of each row, which has all of COLUMNS; those that may be missing are None.

    Args:
        source: where the rows stand.
        columns: our field -> the source's column; fields not named keep their own names. Where one of `prompt` and
            `messages` is named, the other is not read.
        make: raises InputError for a row that cannot be used.

    Raises:
        PromptError: no rows, a column that is not there, or all rows that cannot be used, by their places.
    """
    _check_columns(source, columns)
    unread = {*ASKED} - columns.keys() if columns.keys() & {*ASKED} else set()
    named = {field: columns.get(field, field) for field in COLUMNS if field not in unread}
    made, problems, places = [], [], dict[str, str]()
    for number, (place, row) in enumerate(source.rows, 1):
        try:
            if isinstance(row, PromptError):
                raise row
            fields = _fields({field: row.get(column) for field, column in named.items()}, source.name, number)
            if (before := places.setdefault(fields["id"], place)) != place:
                raise PromptError(f"the id {fields['id']!r} was used before, at {before}; ids must differ")
            made.append(make(fields))
        except InputError as error:
            problems.append(f"{place}: {error}")
    if problems:
        raise PromptError(_sentence(source.where, problems))
    return made


def _check_columns(source: Source, columns: Mapping[str, str]) -> None:
    if not source.rows:
        raise PromptError(f"{source.where} holds no prompts; give a source with one at least")
    if not (known := source.columns):
        return  # no row can be read, and each says why
    wanted = {column: f"column {column!r}" for column in columns.values()}
    if not columns.keys() & {*ASKED} and not {*ASKED} & {*known}:
        wanted[""] = "column 'prompt' or 'messages'"
    if missing := [said for column, said in wanted.items() if column not in known]:
        raise PromptError(
            f"{source.where} has no {missing[0]}; it has {', '.join(known)}: set data.columns, "
            "or give `layerbudget init` --column FIELD=NAME"
        )


def _sentence(where: str, problems: list[str]) -> str:
    if len(problems) == 1:
        return f"{where}, {problems[0]}"
    more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
    return f"{where} has {len(problems)} problems: {'; '.join(problems[:SHOWN])}{more}"


def _fields(row: Row, name: str, number: int) -> dict[str, Any]:
    """The fields of a row; `reference` is the tuple of right answers, or None."""
    row = {field: None if value is None or value != value else value for field, value in row.items()}  # NaN: missing
    messages, judge = row.get("messages"), row["judge"]
    if isinstance(messages, str):
        messages = _turns(messages)
    if judge is not None and not isinstance(judge, str):
        raise PromptError(f"the judge should be a text, got {judge!r:.80}")
    if len(task := _text("task", row) or name) > strict_json.LONGEST_NAME:
        raise PromptError(
            f"the task {task!r:.40} has {len(task)} characters; at most {strict_json.LONGEST_NAME} are right"
        )
    return {
        "id": _text("id", row) or f"{name}-{number}",
        "task": task,
        "group": _text("group", row) or "",
        "prompt": None if messages and row.get("prompt") == "" else row.get("prompt"),
        "messages": messages,
        "raw": _flag(row["raw"]),
        "reference": _references(row["reference"]),
        "judge": judge or None,
    }


def _text(field: str, row: Row) -> str | None:
    """A text, or the text of a number."""
    value = row[field]
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise PromptError(f"the field {field!r} should be a text or a number, got {value!r:.80}")
    return str(value)


def _references(value: Any) -> tuple[str, ...] | None:
    if value is None or value == []:
        return None
    texts = [_text("reference", {"reference": one}) for one in (value if isinstance(value, list) else [value])]
    if None in texts:
        raise PromptError(f"the list of references holds null, {value!r:.80}; it should hold the right answers")
    return tuple(text for text in texts if text is not None)


def _turns(cell: str) -> Any:
    """The turns of a conversation in a table's cell; None for an empty one."""
    try:
        return strict_json.parse(cell) if cell.strip() else None
    except strict_json.NotJSONError as error:
        raise PromptError(
            f"messages should be a list of turns, got {cell!r:.80}, which is not JSON ({error})"
        ) from None


def _flag(value: Any) -> Any:
    """`raw` as tables write it; what is neither is refused where the question is made."""
    flags = {"": None, "true": True, "false": False}
    return flags.get(value.strip().lower(), value) if isinstance(value, str) else value
