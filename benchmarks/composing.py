"""What composing batches of a large set is worth, by measured step costs: no model runs.

    python benchmarks/composing.py --costs mixed-smollm2-135m-cpu-float32
    python benchmarks/composing.py --costs mixed-qwen2.5-coder-1.5b-cpu-float32 --layers 28 \\
        --run runs/qwen_embedded

Prompts have the lengths of the embedded ones (a token for four characters) and plans drawn with the shares of the
demo's allocator, or those that the allocator of a run chose; 64 new tokens, batches of 32. Compared, as
time to that of stock batches of like length:

- composed: as `generate_many` composes them
- by_length: mixed batches of like length
- as_they_come: mixed batches in the prompts' order
- homogeneous: full batches of one plan and of like length, a part of a batch counted as its share of a full one: what
  composing cannot better

Writes benchmarks/results/composing-NAME.json.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from mixed import chosen_plans, demo_plans

from backbone.plan import LayerPlan
from oracle.prompts import load_prompts
from runtime.offline import Batch, Composer
from runtime.step_costs import StepCosts

RESULTS = Path(__file__).parent / "results"
BATCH, NEW_TOKENS, CHARACTERS = 32, 64, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--costs", default="mixed-smollm2-135m-cpu-float32", help="a result of mixed.py")
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--run", type=Path, help="folder of a finished run of that model")
    parser.add_argument("--prompts", type=int, nargs="+", default=[96, 256, 1024])
    arguments = parser.parse_args()
    measured = json.loads((RESULTS / f"{arguments.costs}.json").read_text())["step_costs"]
    costs = StepCosts(**{name: tuple(value) if isinstance(value, list) else value for name, value in measured.items()})
    run, n_layers = arguments.run, arguments.layers
    drawn = [chosen_plans(run, count) if run else demo_plans(n_layers, count) for count in arguments.prompts]
    rows = [compared(costs, plans) for plans in drawn]
    path = RESULTS / f"composing-{arguments.costs.removeprefix('mixed-')}.json"
    result = {"costs": arguments.costs, "run": run and run.name, "batch": BATCH, "rows": rows}
    path.write_text(json.dumps(result, indent=2) + "\n")
    for row in rows:
        print(json.dumps(row))


def compared(costs: StepCosts, plans: list[LayerPlan]) -> dict[str, float]:
    """The ways to run these prompts, as ratios to stock."""
    draw, count, n_layers = random.Random(0), len(plans), plans[0].n_layers
    embedded = load_prompts("embedded")
    lengths = [1 + len(draw.choice(embedded).prompt) // CHARACTERS for _ in range(count)]
    own = Composer(costs, plans, lengths, NEW_TOKENS)
    stock = Composer(costs, [LayerPlan.full(n_layers)] * count, lengths, NEW_TOKENS)
    longest = sorted(range(count), key=lambda place: -lengths[place])
    yardstick = total(stock, parts(longest))
    homogeneous = 0.0
    for plan in {*plans}:
        alike = [place for place in longest if plans[place] == plan]
        for batch in parts(alike):
            filled = [batch[i * len(batch) // BATCH] for i in range(BATCH)]
            homogeneous += own.ms(filled) * len(batch) / BATCH
    found = {
        "composed": total(own, own.composed(BATCH)),
        "by_length": total(own, parts(longest)),
        "as_they_come": total(own, parts(list(range(count)))),
        "homogeneous": homogeneous,
    }
    ratios = {name: round(ms / yardstick, 4) for name, ms in found.items()}
    return {"prompts": count, **ratios, "of_homogeneous": round(homogeneous / found["composed"], 4)}


def parts(places: Batch) -> list[Batch]:
    return [places[start : start + BATCH] for start in range(0, len(places), BATCH)]


def total(composer: Composer, batches: list[Batch]) -> float:
    return sum(map(composer.ms, batches))


if __name__ == "__main__":
    main()
