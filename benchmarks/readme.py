"""Write the figures of README.md and docs/results.md from the committed results.

    python benchmarks/readme.py           # rewrites both files
    python benchmarks/readme.py --check   # exits with status 1 where a figure is not that of its file

Figures stand between `<!-- figures: NAME -->` and `<!-- end -->`; NAME is one of the functions of `BLOCKS`.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (ROOT / "README.md", ROOT / "docs" / "results.md")
BLOCK = re.compile(r"(<!-- figures: (\w+) -->\n).*?(<!-- end -->)", re.S)
EARLIER = ("qwen_embedded", "smollm2_chat", "qwen_chat")
"""Runs of earlier versions, as committed; docs/results.md says what has changed since."""


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--check", action="store_true", help="write nothing")
    check = options.parse_args().check
    for page in PAGES:
        text = page.read_text()
        if (new := rendered(text)) == text:
            continue
        if check:
            sys.exit(f"{page.name} does not show the committed results: run `python benchmarks/readme.py`")
        page.write_text(new)
        print(page.name)


def rendered(page: str) -> str:
    """A page with every block of figures as the results have them."""
    return BLOCK.sub(lambda found: f"{found[1]}{BLOCKS[found[2]]()}\n{found[3]}", page)


def gain() -> str:
    """What the demo gives, in one sentence."""
    runs = _demo()["runs"]
    budget, quality, single, batch = (
        _range([run["figures"][name] for run in runs], form)
        for name, form in (
            ("certified_budget", "{:.0%}"),
            ("quality", "{:.1%}"),
            ("speed_one_at_a_time", "{:.2f}"),
            ("speed_in_a_batch", "{:.2f}"),
        )
    )
    kinds = _demo()["metrics"]["worst_task"]["tasks"]
    return (
        f"Gemma 3 270M, {kinds} kinds of short questions over prompts of some 280 tokens: the allocator runs\n"
        f"{budget} of the decoder and scores {quality} of what the full model scores. It is\n"
        f"{single} times as fast as stock `generate()` one prompt at a time, {batch} times in a batch.\n"
        f"Figures are those of {len(runs)} fresh runs with splits of their own."
    )


def fresh_runs() -> str:
    """Every fresh run of the demo."""
    names = ("certified_budget", "quality", "speed_one_at_a_time", "speed_in_a_batch", "headroom")
    rows = [
        [str(run["seed"]), f"{run['seconds'] / 60:.1f}", *(f"{run['figures'][name]:.3f}" for name in names)]
        for run in _demo()["runs"]
    ]
    head = ["data.seed", "minutes", "of the decoder", "score, of full", "speed, one", "speed, batch", "headroom"]
    return _table(head, rows)


def policies() -> str:
    """The middle run's table of what explains the score, on unseen prompts."""
    metrics = _demo()["metrics"]
    rows = [
        [
            row["name"],
            f"{row['layers']:.1f}",
            f"{row['budget']:.0%}",
            f"{row['quality']:.3f}",
            f"{row['quality_ratio']:.0%}",
        ]
        for row in metrics["contributions"]
    ]
    head = ["", f"layers of {metrics['model']['layers']}", "of the decoder", "mean score", "of the full model's"]
    return _table(head, rows)


def earlier_runs() -> str:
    """Runs of earlier versions."""
    rows = [table.row(RESULTS / f"{name}.json") for name in EARLIER]
    return _table(table.COLUMNS, rows)


BLOCKS: Mapping[str, Callable[[], str]] = {one.__name__: one for one in (gain, fresh_runs, policies, earlier_runs)}


def _demo() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / "demo.json").read_text())
    return found


def _range(values: Sequence[float], form: str) -> str:
    return f"{form.format(min(values))} to {form.format(max(values))}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))


if __name__ == "__main__":
    main()
