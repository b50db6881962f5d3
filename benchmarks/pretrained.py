"""Make the allocator that comes with the package from a finished run of the demo.

    python benchmarks/pretrained.py --run runs/fresh-2/demo      # writes layerbudget/allocator

Exit heads are stored in bfloat16, in which the demo's model computes, so that the folder takes half the space.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from backbone.healing.healing import Healing
from runtime.allocator import Allocator

FOLDER = Path(__file__).parents[1] / "layerbudget" / "allocator"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--run", type=Path, default=Path("runs/demo"), help="folder of a finished run")
    allocator = Allocator.from_pretrained(options.parse_args().run / "allocator")
    assert allocator.healing is not None
    bridges = {
        plan: {first: bridge.to(torch.device("cpu"), torch.bfloat16) for first, bridge in of_plan.items()}
        for plan, of_plan in allocator.healing.bridges.items()
    }
    healing = Healing(allocator.healing.fingerprint, bridges, allocator.healing.adapter)
    replace(allocator, healing=healing).save_pretrained(FOLDER)
    print(f"{FOLDER}: {sum(path.stat().st_size for path in FOLDER.iterdir()) / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
