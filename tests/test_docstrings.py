"""Docstrings that list arguments list all of them, and the stages' say their place."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from built_wheel import PACKAGES, ROOT

from pipelines.run.state import STAGES


def functions() -> Iterator[tuple[str, ast.FunctionDef, str]]:
    for path in sorted(path for name in PACKAGES for path in (ROOT / name).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                yield f"{path.relative_to(ROOT)}:{node.lineno} {node.name}", node, ast.get_docstring(node) or ""


def test_arguments_are_listed_completely() -> None:
    missing = {}
    for place, node, text in functions():
        if "Args:" in text:
            rest = [argument.arg for argument in (*node.args.args, *node.args.kwonlyargs)]
            rest += [node.args.kwarg.arg] if node.args.kwarg else []
            lacking = [name for name in rest if name not in ("self", "cls") and not re.search(rf"\b{name}\b", text)]
            missing |= {place: lacking} if lacking else {}
    assert missing == {}


@pytest.mark.parametrize(("number", "stage"), list(enumerate(STAGES, 1)), ids=[stage.name for stage in STAGES])
def test_a_stage_says_which_one_it_is(number, stage) -> None:
    text = (Path(ROOT) / "pipelines" / "stages" / f"{stage.name}.py").read_text()
    assert text.startswith(f'"""Stage {number}: ')
