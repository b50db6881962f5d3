"""The project's own prompts: many kinds of short questions, each asked after worked examples.

A kind is a hand-written table in `workload/KIND.tsv`: a line with the instruction, a line with the names of the two
fields, then rows of a text and its answer. The first rows are the worked examples, in sets as an endpoint would keep
them; every other row becomes one prompt.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

FOLDER = Path(__file__).with_name("workload")
EXAMPLES = (6, 10)
"""The sizes of a kind's sets of worked examples, taken in turn."""


def embedded_prompts() -> list[dict[str, str]]:
    """Return every prompt as a dict of id, task, prompt, reference and judge."""
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
