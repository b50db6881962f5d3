"""Run the demo from nothing and keep what it measured: time of each stage, peak memory, metrics, figures that repeat.

    python benchmarks/demo.py
    python benchmarks/demo.py --finished    # the run is there: measure no time from nothing

Runs configs/demo.yaml twice, the first time without a run folder and with an empty conversion cache, deals its prompts
anew to the splits many times (`redraws.py`), and writes benchmarks/results/demo.json; prints the README's table of the
run's own split and one of all draws, which is the one that repeats.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import redraws

from pipelines.config import Config, load_config

ROOT = Path(__file__).parents[1]
KEPT = (
    *("best", "captured_headroom", "frontier", "comparison", "stand_ins", "certificate", "prompts", "worst_task"),
    *("labelling", "overhead_ms", "feature_ms", "speed", "model", "machine", "intervals", "examples"),
)
POLICIES = ("full", "best_static", "static_mixture", "random", "oracle", "lightgbm", "mlp")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--finished", action="store_true", help="take the first run's time from its stages")
    options.add_argument("--draws", type=int, default=40)
    arguments = options.parse_args()
    folder = ROOT / "runs" / "demo"
    if folder.exists() and not arguments.finished:
        sys.exit(f"{folder} is there already; the demo is measured from nothing, so move it away first")
    times = _run_times(2 - arguments.finished)
    stages = json.loads((folder / "run.json").read_text())["stages"]
    seconds = {name: stage["seconds"] for name, stage in stages.items()}
    metrics = json.loads((folder / "metrics.json").read_text())
    result = {
        "first_run_seconds": round(sum(seconds.values()), 1) if arguments.finished else times[0],
        "second_run_seconds": times[-1],
        "peak_memory_gib": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20, 2),
        "stage_seconds": seconds,
        "metrics": {name: metrics[name] for name in (*POLICIES, *KEPT)},
        "redrawn": redraws.redrawn(_config(), arguments.draws),
    }
    path = ROOT / "benchmarks" / "results" / "demo.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(path, results_table(result), redraws.results_table(result["redrawn"]), sep="\n\n")


def _config() -> Config:
    """The demo's, wherever this script was started."""
    return load_config(ROOT / "configs" / "demo.yaml").model_copy(update={"runs": ROOT / "runs"})


def _run_times(runs: int) -> list[float]:
    """Seconds of so many runs after each other; with two of them the first begins without converted weights."""
    command, times = [sys.executable, "-m", "layerbudget", "run", "configs/demo.yaml"], []
    with tempfile.TemporaryDirectory() as cache:
        own = {"LAYERBUDGET_CACHE": cache} if runs > 1 else {}
        for _ in range(runs):
            start = time.perf_counter()
            subprocess.run(command, cwd=ROOT, env={**os.environ, **own}, check=True)
            times.append(round(time.perf_counter() - start, 1))
    return times


def results_table(result: dict[str, Any]) -> str:
    """The README's table of the one split of the run, in Markdown."""
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
