"""Ways to damage one value of a JSON file that stays JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

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

_PLACE = "the value goes here"


def keys_in(data: dict[str, Any], depth: int = 2) -> Iterator[Keys]:
    """The path of every key, down to a depth."""
    for key, value in data.items():
        yield (key,)
        if isinstance(value, dict) and depth > 1:
            yield from ((key, *rest) for rest in keys_in(value, depth - 1))


def without(keys: Keys) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        data = json.loads(path.read_text())
        del _parent(data, keys)[keys[-1]]
        path.write_text(json.dumps(data))

    return damage


def wrong(keys: Keys, text: str) -> Callable[[Path], None]:
    """The key's value becomes this JSON text."""

    def damage(path: Path) -> None:
        data = json.loads(path.read_text())
        _parent(data, keys)[keys[-1]] = _PLACE
        path.write_text(json.dumps(data).replace(json.dumps(_PLACE), text))

    return damage


def _parent(data: dict[str, Any], keys: Keys) -> dict[str, Any]:
    for key in keys[:-1]:
        data = data[key]
    return data
