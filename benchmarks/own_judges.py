"""What a loss that reads no reference means in the prompts' own scores: test prompts of a finished run, rescored.

    python benchmarks/own_judges.py --run runs/gemma_mixed --name gemma_mixed --prompts 64

For runs with `data.force_judge`. Labels the first test prompts once more, by the judge that each names in its file.
Prompts on whose full answer this judge fails are left out. Writes benchmarks/results/own-judges-NAME.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import workload

from oracle.frontier.frontier import equal_mean_budget, static_points
from oracle.labels.reader import judged, score_matrix
from pipelines.config import Config, load_config
from pipelines.run.prompts import prompts_of
from pipelines.run.workspace import Workspace
from pipelines.stages.label import fill

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--run", type=Path, default=Path("runs/gemma_mixed"), help="folder of a finished run")
    options.add_argument("--name", default="gemma_mixed", help="name in the result's file")
    options.add_argument("--prompts", type=int, default=64)
    arguments = options.parse_args()
    config = load_config(arguments.run / "config.yaml")
    config = config.model_copy(update={"runs": arguments.run.parent, "name": arguments.run.name})
    settings = argparse.Namespace(name=arguments.name, model=config.model.source, data=config.data.path)
    workload.write(RESULTS / f"own-judges-{arguments.name}.json", settings, rescored(config, arguments.prompts))


def rescored(config: Config, count: int) -> dict[str, Any]:
    """Scores of every static plan, and of the plans that the run's policies chose; see `choices.json`."""
    workspace = Workspace(config)
    own = config.model_copy(update={"data": config.data.model_copy(update={"force_judge": None})})
    as_judged = {prompt.id: prompt for prompt in workspace.prompts.render(prompts_of(own))}
    choices = json.loads(workspace.path("choices.json").read_text())
    prompts, menu = [as_judged[name] for name in choices["ids"][:count]], workspace.menu()
    labeller = workspace.labeller(workspace.healing)
    fill(labeller, dict.fromkeys(menu.plans, prompts), "labels by own judges")
    rows, scores = judged(score_matrix(labeller.read(prompts, menu)))
    budgets, places = np.array(menu.budgets), np.arange(len(rows))
    if not (full := float(scores.sum(axis=0)[-1]) / max(1, len(rows))):
        raise SystemExit(f"the full model scores nothing on the first {count} test prompts by their own judges")
    chosen = {name: np.array(plans)[rows] for name, plans in choices["chosen"].items()}
    return {
        "prompts": len(rows),
        "full": full,
        "static": static_points(scores, budgets),
        "equal_mean_budget": equal_mean_budget(scores, budgets),
        "policies": {
            name: {"budget": float(budgets[plans].mean()), "quality_ratio": float(scores[places, plans].mean()) / full}
            for name, plans in chosen.items()
        },
    }


if __name__ == "__main__":
    main()
