"""Ways to damage one value of a JSON file that stays JSON."""

from __future__ import annotations

import json
from pathlib import Path

from damage import Damage

Keys = tuple[str, ...]

WRONG: dict[str, str] = {
    "a number": "7",
    "a text": '"x"',
    "a list": "[[]]",
    "an object": '{"x": {}}',
    "null": "null",
    "true": "true",
    "negative": "-1",
    "NaN": "NaN",
    "too large": "1e999",
    "huge": "9" * 5000,
    "deep": "[" * 5000 + "]" * 5000,
    "half a character": '"\\ud800"',
}
"""Name -> JSON text that is put in the place of a value."""
WAYS = ("missing", *WRONG)

_PLACE = "the value goes here"


def value_damaged(keys: Keys, way: str) -> Damage:
    """The value at the end of a path of keys is missing, or becomes the text of that name."""

    def damage(path: Path) -> None:
        data = parent = json.loads(path.read_text())
        for key in keys[:-1]:
            parent = parent[key]
        if way == "missing":
            del parent[keys[-1]]
        else:
            parent[keys[-1]] = _PLACE
        path.write_text(json.dumps(data).replace(json.dumps(_PLACE), WRONG.get(way, "")))

    return damage
