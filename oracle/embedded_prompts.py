"""The demo's prompts: twelve kinds of short few-shot work, made from the tables in embedded_prompts.json.

A source yields records, a group of a task names the two fields to show and to answer, and a prompt is
a template filled with a few solved rows and then with the row to solve, cut where its answer begins.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from random import Random
from typing import NamedTuple, TypedDict

Record = dict[str, str]


class Group(TypedDict):
    """One way to ask a task: the source of its records, the fields shown and answered, the wordings."""

    source: str
    x: str
    y: str
    templates: list[str]


class Task(TypedDict):
    """One kind of work: how answers are judged, the fewest and most solved examples, the groups."""

    judge: str
    shots: list[int]
    groups: list[Group]


class Table(TypedDict):
    """Hand-written records as rows under a header."""

    header: list[str]
    rows: list[list[str]]


class Data(TypedDict):
    """The content of embedded_prompts.json."""

    tasks: dict[str, Task]
    tables: dict[str, Table]
    words: dict[str, list[str]]
    made: dict[str, int]


class Row(NamedTuple):
    """A question, its answer, and a key shared by rows that would give each other's answer away."""

    x: str
    y: str
    key: str


DATA: Data = json.loads(Path(__file__).with_name("embedded_prompts.json").read_text(encoding="utf-8"))
WORDS, MADE = DATA["words"], DATA["made"]
CANDIDATES = 20


def embedded_prompts() -> list[dict[str, str]]:
    """Return every demo prompt as a dict of id, task, prompt, reference and judge."""
    return [item for name, task in DATA["tasks"].items() for item in _task_prompts(name, task)]


def _task_prompts(name: str, task: Task) -> Iterator[dict[str, str]]:
    items = [(group, row) for group in task["groups"] for row in _rows(group)]
    for number, (group, row) in enumerate(items):
        item_id = f"{name}-{number:04d}"
        prompt = _prompt(group, row, task["shots"], Random(item_id))
        yield {"id": item_id, "task": name, "prompt": prompt, "reference": row.y, "judge": task["judge"]}


def _prompt(group: Group, row: Row, shots: list[int], rng: Random) -> str:
    template = rng.choice(group["templates"])
    solved = [template.format(x=shot.x, y=shot.y) for shot in _shots(group, row, rng.randint(*shots), rng)]
    return "\n".join([*solved, template.partition("{y}")[0].format(x=row.x).rstrip()])


def _shots(group: Group, row: Row, size: int, rng: Random) -> list[Row]:
    others = [other for other in _rows(group) if other.key != row.key and other.x != row.y]
    spread = _spread(rng.sample(others, CANDIDATES))
    return rng.sample(spread[:size], size)


def _spread(rows: list[Row]) -> list[Row]:
    """Order rows so that every answer comes once before any comes twice."""
    seen: Counter[str] = Counter()

    def turn(row: Row) -> int:
        seen[row.y] += 1
        return seen[row.y]

    return sorted(rows, key=turn)


def _rows(group: Group) -> list[Row]:
    return _fields(group["source"], group["x"], group["y"])


@cache
def _fields(source: str, x: str, y: str) -> list[Row]:
    return [Row(record[x], record[y], record.get("key", record[x])) for record in _records(source)]


@cache
def _records(source: str) -> list[Record]:
    maker = MAKERS.get(source)
    if maker:
        return [maker(number, Random(f"{source}-{number}")) for number in range(MADE[source])]
    table = DATA["tables"][source]
    return [dict(zip(table["header"], row, strict=True)) for row in table["rows"]]


def _purchase(number: int, rng: Random) -> Record:
    """A sentence with a name, a colour and a city in it."""
    fields = {"name": "names", "colour": "colours", "item": "goods", "city": "cities"}
    record = {field: rng.choice(WORDS[words]) for field, words in fields.items()}
    return record | {"text": rng.choice(WORDS["frames"]).format(**record)}


def _phrase(number: int, rng: Random) -> Record:
    """An adjective and two nouns."""
    return {"phrase": " ".join([rng.choice(WORDS["adjectives"]), *rng.sample(WORDS["nouns"], 2)])}


def _sentence(number: int, rng: Random) -> Record:
    """What someone does, in the present, in the past, and with its words mixed up."""
    activities = DATA["tables"]["activities"]["rows"]
    name = WORDS["names"][number % len(WORDS["names"])]
    today, yesterday = activities[number % len(activities)]
    plain = f"{name} {today}"
    return {"key": today, "today": plain, "yesterday": f"{name} {yesterday}", "plain": plain, "mixed": _mix(plain, rng)}


def _mix(sentence: str, rng: Random) -> str:
    words = sentence.split()
    mixed = rng.sample(words, len(words))
    return " ".join(mixed) if mixed != words else _mix(sentence, rng)


def _numbers(number: int, rng: Random) -> Record:
    """Three numbers in equal steps and the one that comes next."""
    start, record = number + 1, {}
    for step in (1, 2, 5, 10):
        record[f"by {step}"] = ", ".join(str(start + step * turn) for turn in range(3))
        record[f"then {step}"] = str(start + step * 3)
    return record


MAKERS: dict[str, Callable[[int, Random], Record]] = {
    "purchases": _purchase,
    "phrases": _phrase,
    "sentences": _sentence,
    "numbers": _numbers,
}
