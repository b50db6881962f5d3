"""The field's words: names and phrases of earlier versions stay away, outside of the history."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HISTORY = {"CHANGELOG.md", "docs/log.md", "tests/test_vocabulary.py"}
FOLDERS = ("backbone", "benchmarks", "configs", "controller", "docs", "examples", "layerbudget", "oracle", "pipelines",
           "runtime", "serving", "tests", "token_exits")  # fmt: skip
SUFFIXES = (".py", ".md", ".yaml", ".j2")
OLD = {
    "healing": r"[Ss]tand-ins?\b|StandIn|(?<!['\"])\bstand_ins?\b(?!\.safetensors)",
    "plan selection": r"\bDecider\b|\bdeciding\.py",
    "distillation": r"\b[Ll]esson|\btaught\b|\bteaches\b",
    "fitted predictor": r"\bLearned\b",
    "losses": r"\bplan_quality\b|\bfull_quality\b",
    "loss scale": r"\bunit_of\b|\bkept_by_full\b",
    "verification": r"\bShortcut\b|\bhas_parted\b|\bis_settled\b|\bworth_leading\b|\bparted\b",
    "test martingale": r"\b[Gg]ambl|\bgames?\b",
    "alarm": r"\brung\b|\bfalls? silent\b|\balarm rings\b",
    "cost estimate": r"\brehears|\boutlook\b",
    "rescoring": r"\bjudged_anew\b",
    "remote labels": r"\bdistant_label",
    "Lagrangian sweep": r"\bclimb|\bupgrades\b",
    "gates": r"\bof_the_head\b|\bof_states\b",
    "memory budget": r"\bdevice_memory\b|\bcheck_room\b",
    "examples": r"\bshown_prompts\b",
    "generate": r"\btwo doors\b|\bown door\b",
    "wall-clock time": r"\b(?:on|as) the clock\b",
    "plain words": r"\bas it came\b|\bnothing lost\b",
}
"""The word of today -> what it was called."""


@pytest.mark.parametrize("today", OLD)
def test_old_words_are_gone(today) -> None:
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"]
    pages += [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in SUFFIXES]
    found = [
        f"{path.relative_to(ROOT)}: {match[0]}"
        for path in pages
        if str(path.relative_to(ROOT)) not in HISTORY
        for match in re.finditer(OLD[today], path.read_text(encoding="utf-8"))
    ]
    assert found == [], today


def test_old_words_would_be_seen() -> None:
    assert re.search(OLD["healing"], "the stand-ins of a model")
    assert not re.search(OLD["healing"], '"stand_ins.safetensors"')
