"""Keep what a finished run measured.

    python benchmarks/keep.py --run runs/qwen_mixed

Writes benchmarks/results/NAME.json, the run's metrics with the settings of its controllers. Of the model's source only
the last part stays.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--run", type=Path, required=True, help="folder of a finished run")
    folder = options.parse_args().run
    metrics = json.loads((folder / "metrics.json").read_text())
    source = metrics["model"]["source"]
    kept = {
        **{name: found for name, found in metrics.items() if name != "examples"},
        "model": {**metrics["model"], "source": Path(source).name},
        "tuning": json.loads((folder / "tuning.json").read_text()),
        "stage_seconds": {
            name: stage["seconds"] for name, stage in json.loads((folder / "run.json").read_text())["stages"].items()
        },
    }
    (RESULTS / f"{folder.name}.json").write_text(json.dumps(kept, indent=2) + "\n")
    print(RESULTS / f"{folder.name}.json")


if __name__ == "__main__":
    main()
