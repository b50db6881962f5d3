"""Write docs/configuration.md: every key of a configuration with its type, default and meaning.

    python benchmarks/configuration.py

The meanings are the docstrings below the keys in `pipelines/config/`.
"""

from __future__ import annotations

import ast
import inspect
import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from pipelines.config import Config
from pipelines.config.sections import Section

PAGE = Path(__file__).parents[1] / "docs" / "configuration.md"
INTRODUCTION = """# Configuration

A run is one YAML file. Only `name` and `model.source` have no default. `--set section.key=value` overrides the file,
and `layerbudget check CONFIG` reports what would fail. `layerbudget init MODEL PROMPTS` writes a file with a reason for
each value. `python benchmarks/configuration.py` makes this page from the code.
"""
LIMITS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
NAMES = {"string": "text", "boolean": "true or false", "object": "keys and values"}


def page() -> str:
    """The whole page: the keys without a section, then one table a section."""
    sections = {name: field.annotation for name, field in Config.model_fields.items() if is_section(field.annotation)}
    parts = [INTRODUCTION, *table(Config), *(line for name, one in sections.items() for line in titled(name, one))]
    return "\n".join(parts) + "\n"


def is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Section)


def titled(name: str, section: type[Section]) -> list[str]:
    told = [inspect.cleandoc(section.__doc__), ""] if section.__doc__ else []
    return ["", f"## `{name}`", "", *told, *table(section)]


def table(section: type[Section]) -> Iterator[str]:
    """The rows of a section's keys; a key that is itself a section has a table of its own."""
    schema, meanings = section.model_json_schema(), meanings_of(section)
    yield from ("| key | type | default | meaning |", "| --- | --- | --- | --- |")
    for name, field in section.model_fields.items():
        if field.exclude or is_section(field.annotation):
            continue
        default = field.get_default(call_default_factory=True)
        shown = "" if field.is_required() else f"`{json.dumps(default, ensure_ascii=False, default=str)}`"
        cells = [f"`{name}`", type_of(schema["properties"][name]), shown, meanings[name]]
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def type_of(schema: dict[str, Any]) -> str:
    """A value's type and range in words, from its JSON schema."""
    if "anyOf" in schema:
        return " or ".join(type_of(one) for one in schema["anyOf"])
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if schema["type"] == "array":
        return f"list of {type_of(schema['items'])}"
    limits = " and ".join(f"{sign} {schema[key]:g}" for key, sign in LIMITS.items() if key in schema)
    return f"{NAMES.get(schema['type'], schema['type'])} {limits}".strip()


def meanings_of(section: type[Section]) -> dict[str, str]:
    """The docstring below each key of a section, on one line."""
    body = ast.parse(inspect.getsource(section)).body[0].body
    found = {}
    for key, below in pairwise(body):
        match key, below:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                found[name] = " ".join(text.split())
    return found


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE.name)
