"""Draw README's picture: score against speed, from a committed result.

python benchmarks/picture.py        # benchmarks/results/demo.json -> docs/gain.svg
"""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).parents[1]


def main() -> None:
    metrics = json.loads((ROOT / "benchmarks" / "results" / "demo.json").read_text())["metrics"]
    matplotlib.rcParams.update({"svg.hashsalt": "layerbudget", "font.size": 11})
    speed, full = metrics["speed"], metrics["full"]["quality"]
    plans = [
        (times["value"], score / full)
        for times, (_, score) in zip(speed["plan_intervals"], metrics["healing"]["after"]["static"], strict=True)
    ]
    figure, axes = plt.subplots(figsize=(7.2, 3.4), layout="constrained")
    axes.plot(*zip(*sorted(plans[:-1]), strict=True), "o-", color="#888888", label="one plan for all prompts")
    axes.plot(*plans[-1], "s", color="#222222", markersize=9, label="full model")
    own = (speed["speedup_batch"], metrics["contributions"][-1]["quality_ratio"])
    axes.plot(*own, "*", color="#c03030", markersize=18, label="layerbudget")
    axes.axhline(1, color="#cccccc", linewidth=1, zorder=0)
    axes.set_xlabel("speed: requests a second, full model = 1 (batches of 8)")
    axes.set_ylabel("score, full model = 1")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(ROOT / "docs" / "gain.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
