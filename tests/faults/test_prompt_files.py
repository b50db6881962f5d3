"""A damaged file of prompts: each line is read as it stands or refused by its number."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from child import Ended
from damage import DEEP, Damage, content, damages_of
from outcome import Check, may_be_accepted, must_be_refused
from project import GENERATE, QUICK_MENU, Project
from selection import selected

Row = dict[str, Any]
CHANGED = 80
"""The line that is changed where only one is."""


_ROW: Row = {"id": "changed", "task": "long", "prompt": "abc", "reference": "", "judge": "agreement"}


def _line(text: str) -> Damage:
    """Puts another line in the place of one."""

    def change(old: bytes) -> bytes:
        lines = old.split(b"\n")
        lines[CHANGED] = text.encode()
        return b"\n".join(lines)

    return content(change)


def _row(**fields: Any) -> Damage:
    return _line(json.dumps({**_ROW, **fields}, ensure_ascii=False))


def _turns(messages: Any) -> Damage:
    """A row that is a conversation."""
    return _line(json.dumps({**{key: value for key, value in _ROW.items() if key != "prompt"}, "messages": messages}))


def _with(text: str) -> Damage:
    """A row with one more key, of this JSON text."""
    return _line(json.dumps(_ROW)[:-1] + f', "more": {text}}}')


ACCEPTED: dict[str, Damage] = {
    "U+2028 in a prompt": _row(prompt="ab\u2028cd"),
    "U+2029 and U+0085 in a prompt": _row(prompt="ab\u2029c\x85d"),
    "a NUL in a prompt": _row(prompt="ab\0cd"),
    "a character of two halves": _line(json.dumps({**_ROW, "prompt": "ab\U0001f600"})),
    "one more key": _with("1"),
    "raw": _row(raw=True),
    "not raw": _row(raw=False),
    "no messages beside a prompt": _row(messages=None),
    "numbers as texts": _row(id=3, task=2.5, reference=4),
    "no id, no task, no reference": _line('{"prompt": "abc", "judge": "agreement"}'),
    "the number of a line as text": _line(json.dumps({**_ROW, "id": str(CHANGED + 1)})),
    "BOM": content(lambda content: b"\xef\xbb\xbf" + content),
    "CRLF": content(lambda content: content.replace(b"\n", b"\r\n")),
    "no last newline": content(bytes.rstrip),
}
REFUSED: dict[str, Damage] = {
    "half a character": _line(json.dumps(_ROW).replace('"abc"', '"ab\\ud800"')),
    "half a character in an id": _line(json.dumps(_ROW).replace('"changed"', '"\\udfff"')),
    "half a character as bytes": content(
        lambda content: content.replace(b'"prompt": "', b'"prompt": "\xed\xa0\x80', 1)
    ),
    "deep": _with("[" * DEEP + "]" * DEEP),
    "a huge number": _with("9" * 5000),
    "a number too large": _with("1e999"),
    "NaN": _with("NaN"),
    "-Infinity": _with("-Infinity"),
    "a key twice": _line('{"id": "x", ' + json.dumps(_ROW)[1:]),
    "a blank line": _line(""),
    "two rows in a line": _line(json.dumps(_ROW) + json.dumps({**_ROW, "id": "second"})),
    "a list": _line("[]"),
    "a text": _line('"abc"'),
    "null": _line("null"),
    "an empty prompt": _row(prompt=""),
    "a prompt of spaces": _row(prompt=" \n\u2003"),
    "a prompt longer than the model takes": _row(prompt="abcdefgh" * 100),
    "a number as prompt": _row(prompt=3),
    "an id twice": _row(id="long-0"),
    "a list as id": _row(id=["long-0"]),
    "a text as raw": _row(raw="yes"),
    "messages and a prompt": _row(messages=[{"role": "user", "content": "abc"}]),
    "messages without a chat template": _turns([{"role": "user", "content": "abc"}]),
    "no messages": _turns([]),
    "a text as messages": _turns("abc"),
    "messages of another shape": _turns([["user", "abc"]]),
    "messages that are null": _turns([None]),
    "an unknown role": _turns([{"role": "bot", "content": "abc"}]),
    "a list as role": _turns([{"role": ["user"], "content": "abc"}]),
    "a number as content": _turns([{"role": "user", "content": 3}]),
    "an empty turn": _turns([{"role": "user", "content": " "}]),
    "a call of a tool": _turns([{"role": "user", "content": "abc", "tool_calls": [1]}]),
    "the assistant's turn last": _turns([{"role": "assistant", "content": "abc"}]),
    "old Macintosh line ends": content(lambda content: content.replace(b"\n", b"\r")),
}
OF_RUNS: dict[str, Damage] = {
    "a number as judge": _row(judge=3),
    "a reference that the judge cannot use": _row(judge="contains"),
    "an unknown judge": _row(judge="taste"),
    "a judge of no module": _row(judge="no.such.module:judge"),
    "a judge with no name": _row(judge=":"),
    "a judge that is no function": _row(judge="math:pi"),
    "no judge": _line(json.dumps({key: value for key, value in _ROW.items() if key != "judge"})),
}
CASES = {**damages_of("prompts.jsonl"), **ACCEPTED, **REFUSED}


def _rows(path: Path) -> list[Row]:
    """What the file says, read without the code under test."""
    text = path.read_bytes().decode("utf-8-sig")
    return [json.loads(line) for line in text.replace("\r\n", "\n").split("\n") if line]


def _answered_as_written(project: Project) -> Check:
    def check(ended: Ended) -> str | None:
        rows = _rows(project.folder / "prompts.jsonl")
        wanted = [(str(row.get("id", f"prompts-{number}")), row["prompt"]) for number, row in enumerate(rows, 1)]
        lines = (project.folder / "answers.jsonl").read_bytes().decode().split("\n")[:-1]
        found = [(row["id"], row["prompt"]) for row in map(json.loads, lines)]
        return None if found == wanted else f"{len(found)} answers are not to the {len(wanted)} prompts"

    return check


@pytest.mark.parametrize("name", selected(list(CASES), every=12))
def test_generate_answers_what_a_line_says_or_refuses_it(project, attempt, name) -> None:
    CASES[name](project.folder / "prompts.jsonl")
    check = must_be_refused if name in REFUSED else _answered_as_written(project)
    attempt(project, *GENERATE, "--prompts", "prompts.jsonl", "--out", "answers.jsonl", check=check)


@pytest.mark.parametrize("name", selected([*CASES, *OF_RUNS], every=12))
def test_a_run_uses_what_a_line_says_or_refuses_it(project, attempt, name) -> None:
    {**CASES, **OF_RUNS}[name](project.folder / "prompts.jsonl")
    check = must_be_refused if name in {**REFUSED, **OF_RUNS} else may_be_accepted
    attempt(project, *QUICK_MENU, "--set", "name=new", check=check)
