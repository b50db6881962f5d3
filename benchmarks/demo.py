"""Run the demo from nothing and keep what it measured: time of each stage, peak memory, metrics.

    python benchmarks/demo.py

Runs configs/demo.yaml twice, the first time without a run folder and with an empty conversion cache, and writes
benchmarks/results/demo.json and the README's table.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
KEPT = (
    *("best", "captured_headroom", "frontier", "comparison", "stand_ins", "certificate", "prompts"),
    *("labelling", "overhead_ms", "feature_ms", "speed", "model", "machine"),
)
POLICIES = ("full", "best_static", "static_mixture", "random", "oracle", "lightgbm", "mlp")


def main() -> None:
    folder = ROOT / "runs" / "demo"
    if folder.exists():
        sys.exit(f"{folder} is there already; the demo is measured from nothing, so move it away first")
    command = [sys.executable, "-m", "layerbudget", "run", "configs/demo.yaml"]
    with tempfile.TemporaryDirectory() as cache:
        times = []
        for _ in range(2):
            start = time.perf_counter()
            subprocess.run(command, cwd=ROOT, env={**os.environ, "LAYERBUDGET_CACHE": cache}, check=True)
            times.append(round(time.perf_counter() - start, 1))
    metrics = json.loads((folder / "metrics.json").read_text())
    stages = json.loads((folder / "run.json").read_text())["stages"]
    result = {
        "first_run_seconds": times[0],
        "second_run_seconds": times[1],
        "peak_memory_gib": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20, 2),
        "stage_seconds": {name: stage["seconds"] for name, stage in stages.items()},
        "metrics": {name: metrics[name] for name in (*POLICIES, *KEPT)},
    }
    path = ROOT / "benchmarks" / "results" / "demo.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(path, results_table(result), sep="\n\n")


def results_table(result: dict[str, Any]) -> str:
    """The README's table, in Markdown."""
    lines = [
        "| policy | layers of 18 | mean score, of full | loss | headroom captured |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name in POLICIES:
        card = result["metrics"][name]
        headroom = "" if card["captured_headroom"] is None else f"{card['captured_headroom']:.0%}"
        cells = (name, f"{card['layers']:.2f}", f"{card['quality_ratio']:.1%}", f"{card['loss']:.1%}", headroom)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
