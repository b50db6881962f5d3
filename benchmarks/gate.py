"""Hold a finished run against the bands beside its configuration: does it still do what the project is for?

    python benchmarks/gate.py --run runs/gate/demo --bands configs/demo.bands.json

Prints each figure with its band, and exits with status 1 where a figure lies outside or is missing.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path

Bands = Mapping[str, tuple[float, float]]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--run", type=Path, required=True, help="folder of a finished run")
    options.add_argument("--bands", type=Path, required=True, help="JSON file: figure -> [lowest, highest]")
    arguments = options.parse_args()
    if not (arguments.run / "metrics.json").exists():
        sys.exit(f"{arguments.run} holds no finished run: run `layerbudget run CONFIG` first")
    found, bands = figures(arguments.run), json.loads(arguments.bands.read_text())
    wrong = outside(found, bands)
    for name, (low, high) in bands.items():
        print(f"{'OUTSIDE' if name in wrong else 'within ':8}{name:24} {_shown(found.get(name))}   {low:g} to {high:g}")
    if wrong:
        sys.exit(f"{len(wrong)} of {len(bands)} figures lie outside the bands of {arguments.bands}: {', '.join(wrong)}")


def figures(run: Path) -> dict[str, float | None]:
    """What a finished run says of itself, by the names that bands use.

    `fitted_prompts` are the prompts of the split `adapt` that healing was fitted on, as a share of that split.
    `certified_budget` is the share of the decoder that the allocator runs at its certified price on test prompts, 1
    where nothing was certified; `quality` its mean score as a share of the full model's. Speeds are ratios to stock
    `generate()` in the same rounds. `headroom` is what the oracle saves over the static mixture, in decoders.
    """
    metrics, adapt = (json.loads((run / name).read_text()) for name in ("metrics.json", "adapt.json"))
    best = metrics[metrics["best"]]
    return {
        "fitted_prompts": adapt["fitted_prompts"] / metrics["prompts"]["adapt"],
        "certified_budget": best["budget"],
        "quality": best["quality_ratio"],
        "speed_one_at_a_time": metrics["speed"]["speedup_single"],
        "speed_in_a_batch": metrics["speed"]["speedup_batch"],
        "headroom": metrics["frontier"]["headroom"]["value"],
    }


def outside(found: Mapping[str, float | None], bands: Bands) -> list[str]:
    """The figures that are missing or lie outside their bands."""
    values = {name: found.get(name) for name in bands}
    return [name for name, (low, high) in bands.items() if (value := values[name]) is None or not low <= value <= high]


def _shown(value: float | None) -> str:
    return "missing" if value is None else f"{value:.3f}"


if __name__ == "__main__":
    main()
