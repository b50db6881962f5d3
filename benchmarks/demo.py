"""Run the demo from nothing several times, with other splits each time, and keep what the runs measured.

    python benchmarks/demo.py                # three runs of configs/demo.yaml with data.seed 0, 1 and 2
    python benchmarks/demo.py --runs 10

The first run begins with an empty conversion cache. Kept are the figures of every run (see gate.py), and the metrics of
the middle one by the share of the decoder that its allocator runs. Writes benchmarks/results/demo.json, from which
README and docs/results.md are made (readme.py). `redraws.py --run runs/fresh-1/demo` deals a run's prompts anew.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import gate

from runtime.paired_timing import machine

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "demo.yaml"
KEPT = (
    *("full", "best_static", "static_mixture", "random", "oracle", "lightgbm", "mlp"),
    *("best", "captured_headroom", "frontier", "comparison", "healing", "certificate", "prompts", "worst_task"),
    *(
        "contributions",
        "certificates",
        "labelling",
        "overhead_ms",
        "feature_ms",
        "speed",
        "model",
        "machine",
        "intervals",
        "examples",
    ),
)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--runs", type=int, default=3, help="fresh runs, each with splits of its own")
    arguments = options.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        runs = [_run(seed, cache) for seed in range(arguments.runs)]
    middle = sorted(runs, key=lambda run: run["figures"]["certified_budget"])[len(runs) // 2]
    folder = _folder(middle["seed"])
    metrics = json.loads((folder / "metrics.json").read_text())
    result = {
        "machine": machine(),
        "runs": runs,
        "middle": middle["seed"],
        "peak_memory_gib": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20, 2),
        "metrics": {name: metrics[name] for name in KEPT if name in metrics},
    }
    path = ROOT / "benchmarks" / "results" / "demo.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(path)


def _folder(seed: int) -> Path:
    return ROOT / "runs" / f"fresh-{seed}" / "demo"


def _run(seed: int, cache: str) -> dict[str, Any]:
    """One run from nothing: its seed, seconds of all stages and of each, and figures. A finished one is read."""
    folder = _folder(seed)
    command = [sys.executable, "-m", "layerbudget", "run", str(CONFIG), "--set", f"data.seed={seed}"]
    environment = {**os.environ, "LAYERBUDGET_CACHE": cache}
    subprocess.run([*command, "--set", f"runs={folder.parent}"], cwd=ROOT, env=environment, check=True)
    stages = json.loads((folder / "run.json").read_text())["stages"]
    seconds = {name: stage["seconds"] for name, stage in stages.items()}
    return {
        "seed": seed,
        "seconds": round(sum(seconds.values()), 1),
        "stage_seconds": seconds,
        "figures": gate.figures(folder),
    }


if __name__ == "__main__":
    main()
