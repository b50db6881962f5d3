"""The README's table: for each finished run, what a static plan, the oracle and the certified allocator run and gain.

    python benchmarks/table.py benchmarks/results/{demo,qwen_embedded,smollm2_chat,qwen_chat}.json

The files are those of demo.py and keep.py. Budgets are shares of the decoder, speeds ratios to stock `generate()` in
the same run, on unseen prompts; brackets hold 90% intervals.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

COLUMNS = (
    "run",
    "oracle, full mean score (flattered)",
    "certified to keep",
    "allocator runs",
    "kept, of full",
    "speed, one at a time",
    "speed, some together",
    "cheapest static plan that keeps as much",
    "its speed, one at a time",
)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("results", nargs="+", type=Path)
    rows = [row(path) for path in options.parse_args().results]
    print("\n".join("| " + " | ".join(cells) + " |" for cells in [COLUMNS, ["---"] * len(COLUMNS), *rows]))


def row(path: Path) -> list[str]:
    found = json.loads(path.read_text())
    metrics: dict[str, Any] = found.get("metrics", found)
    static, speed, frontier = metrics["healing"]["after"]["static"], metrics["speed"], metrics["frontier"]
    allocator = metrics[metrics["best"]]
    equal = cheapest(static, allocator["quality"])
    return [
        path.stem,
        within(frontier["equal_mean_budget"], "{:.1%}"),
        f"{metrics['certificate']['keep']:.0%}",
        within({"value": allocator["budget"], **metrics["intervals"]["budget"]}, "{:.1%}"),
        within({"value": allocator["quality_ratio"], **metrics["intervals"]["kept"]}, "{:.1%}"),
        within(speed["intervals"]["single"], "{:.2f}"),
        within(speed["intervals"]["batch"], "{:.2f}"),
        f"{static[equal][0]:.1%}",
        within(speed["plan_intervals"][equal], "{:.2f}"),
    ]


def cheapest(static: Sequence[Sequence[float]], quality: float) -> int:
    """The first plan that keeps so much, of (budget, quality) pairs, cheapest first, the last full."""
    return next(place for place, (_, kept) in enumerate(static) if kept >= quality or place == len(static) - 1)


def within(estimate: Mapping[str, float], form: str) -> str:
    value, low, high = (form.format(estimate[name]) for name in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


if __name__ == "__main__":
    main()
