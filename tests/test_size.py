"""Ceilings of each room: what comes later pays for what it adds. Raising one takes a sentence in the commit."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CEILINGS = {  # lines of Python, files
    "backbone": (5090, 35),
    "oracle": (4720, 36),
    "controller": (2990, 20),
    "runtime": (3350, 18),
    "token_exits": (1350, 11),
    "pipelines": (7575, 49),
    "serving": (2950, 27),
    "layerbudget": (1355, 12),
    "tests": (21030, 152),
}
SIDE_BY_SIDE = 14
"""Python files in one folder of the product."""
LONGEST = 300
"""Lines of a file of the product."""


@pytest.mark.parametrize("room", CEILINGS)
def test_rooms_stay_below_their_ceilings(room) -> None:
    files = [path.read_text(encoding="utf-8").count("\n") for path in (ROOT / room).rglob("*.py")]
    lines, count = CEILINGS[room]
    assert sum(files) <= lines
    assert len(files) <= count


def test_files_are_short_and_folders_small() -> None:
    paths = [path for room in CEILINGS if room != "tests" for path in (ROOT / room).rglob("*.py")]
    assert [path for path in paths if path.read_text(encoding="utf-8").count("\n") > LONGEST] == []
    folders = {path.parent for path in paths}
    assert [folder for folder in folders if len(list(folder.glob("*.py"))) > SIDE_BY_SIDE] == []
