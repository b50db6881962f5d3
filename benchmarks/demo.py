"""Run the demo from nothing and keep what it measured: time of each stage, peak memory, metrics.

    python benchmarks/demo.py

Runs configs/demo.yaml in an empty folder, with an empty conversion cache, and writes benchmarks/results/demo.json.
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

ROOT = Path(__file__).parents[1]
KEPT = ("best", "captured_headroom", "certificate", "prompts", "labelling", "overhead_ms", "speed", "model", "machine")
POLICIES = ("full", "best_static", "static_mixture", "random", "oracle", "lightgbm", "mlp")


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        settings = [f"runs={scratch}/runs", f"tracking.uri=sqlite:///{scratch}/mlruns/mlflow.db"]
        command = [sys.executable, "-m", "layerbudget", "run", "configs/demo.yaml"]
        command += [part for setting in settings for part in ("--set", setting)]
        environment = {**os.environ, "LAYERBUDGET_CACHE": f"{scratch}/cache"}
        times = []
        for _ in range(2):
            start = time.perf_counter()
            subprocess.run(command, cwd=ROOT, env=environment, check=True)
            times.append(round(time.perf_counter() - start, 1))
        folder = Path(scratch) / "runs" / "demo"
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
    print(path)


if __name__ == "__main__":
    main()
