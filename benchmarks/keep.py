"""Keep what a finished run measured.

    python benchmarks/keep.py --run runs/qwen_mixed

Writes benchmarks/results/NAME.json, the run's metrics with the settings of its controllers, and NAME.html, its report
without the examples, which belong to whoever wrote the prompts. Of the model's source only the last part stays.
"""

from __future__ import annotations

import argparse
import json
import re
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
    page = (folder / "report.html").read_text().replace(source, Path(source).name)
    page, examples = re.subn(r"<section>\s*<h2>Examples</h2>.*?</section>", "", page, flags=re.DOTALL)
    assert examples == 1, "the report has one section of examples"
    (RESULTS / f"{folder.name}.html").write_text(page)
    print(RESULTS / f"{folder.name}.json")


if __name__ == "__main__":
    main()
