"""Texts that are written over several lines keep the space between their parts."""

import tokenize
from collections.abc import Iterator
from pathlib import Path

from built_wheel import PACKAGES, ROOT

TABLES = {"layerbudget/inspection.py", "oracle/text_normalisation.py", "pipelines/evaluation/summary.py"}
"""Whose columns, or ranges of characters, stand side by side."""


def seams(path: Path) -> Iterator[str]:
    """Places where two parts of one text meet without a space or a line's end."""
    previous = None
    with path.open("rb") as file:
        for token in tokenize.tokenize(file.readline):
            kind = tokenize.tok_name[token.type]
            if kind in ("NL", "COMMENT"):
                continue
            if previous and kind in ("STRING", "FSTRING_START"):
                before, after = previous.rstrip("\"'"), token.string.lstrip("rRfF").lstrip("\"'")
                if before and after and not (before[-1].isspace() or after[0].isspace() or before.endswith("\\n")):
                    yield f"{path.name}:{token.start[0]} ...{before[-20:]}|{after[:20]}..."
            previous = token.string if kind in ("STRING", "FSTRING_END") else None


def test_parts_of_texts_are_separated(tmp_path) -> None:
    (tmp_path / "bad.py").write_text('raise E(\n    f"{x} is wrong;"  # why\n    f"give another"\n)\n')
    assert len([*seams(tmp_path / "bad.py")]) == 1
    files = (path for name in PACKAGES for path in sorted((ROOT / name).rglob("*.py")))
    found = [seam for path in files if str(path.relative_to(ROOT)) not in TABLES for seam in seams(path)]
    assert found == []
