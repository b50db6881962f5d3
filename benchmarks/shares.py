"""How many prompts to learn from and how many to calibrate on, on simulated prompts.

    python benchmarks/shares.py

Prompts of six tasks need a depth that their task and their states tell in part. A controller learns from a share of
the prompts, its price is certified on the others, and the budget that it then runs is measured on a large population;
it is 1 where nothing is certified. `labels` are the labels made in shares of those under every plan. Writes
benchmarks/results/shares.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from prices import price_of

from controller.certificate.calibration import on_path
from controller.learning import Settings, learn
from oracle.prompts import Prompt
from pipelines.config.learning_sections import CalibrationSection
from pipelines.evaluation.learning_table import Table
from runtime.paired_timing import machine

RESULTS = Path(__file__).parent / "results"
BUDGETS = np.linspace(0.5, 1, 8)
TASKS, WIDTH = 6, 40
POPULATION = 10_000


def drawn(random: np.random.Generator, n: int) -> Table:
    """`n` prompts: the full model is right on three quarters, a plan keeps that if it is deep enough."""
    task, states = random.integers(0, TASKS, n), random.normal(size=(n, WIDTH))
    states[:, :TASKS] += 2 * np.eye(TASKS)[task]
    need = np.linspace(0.35, 0.75, TASKS)[task] + 0.12 * states[:, TASKS] + 0.12 * random.normal(size=n)
    full = (random.random(n) < 0.75).astype(float)
    kept = 1 / (1 + np.exp(-(BUDGETS - need[:, None]) / 0.04))
    lucky = random.random((n, len(BUDGETS))) < 0.1
    scores = np.where(random.random((n, len(BUDGETS))) < kept, full[:, None], lucky)
    scores[:, -1] = full
    prompts = [Prompt(str(row), str(task[row]), str(row), "", "exact") for row in range(n)]
    return Table.of(prompts, scores, {"states": states.astype(np.float32)}, BUDGETS, "mean_score")


def measured(name: str, prompts: int, share: float, alpha: float, draws: int) -> dict[str, Any]:
    """A row: mean and standard deviation of the certified budget, how often a price was found, its labels."""
    population, found, labels = drawn(np.random.default_rng(1), POPULATION), [], []
    for draw in range(draws):
        table = drawn(np.random.default_rng(100 + draw), prompts)
        fit, calibrate = np.split(np.arange(prompts), [round(share * prompts)])
        some, other = table.rows(fit), table.rows(calibrate)
        learned = learn(Settings(name, ("states",), 24), some.features, some.losses, some.budgets)
        predicted = learned.predict(other.features)
        price = price_of(predicted, other, CalibrationSection(keep=[1 - alpha]))
        found.append(float(BUDGETS[population.rule.choose(learned.predict(population.features), price)].mean()))
        labels.append(share + (1 - share) * float(on_path(predicted, other.rule).mean()))
    return {
        "controller": name,
        "prompts": prompts,
        "alpha": alpha,
        "share_to_learn": share,
        "budget": round(float(np.mean(found)), 4),
        "sd": round(float(np.std(found)), 4),
        "certified": float(np.mean(np.array(found) < 1)),
        "labels": round(float(np.mean(labels)), 3),
    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--controllers", nargs="+", default=["logistic"])
    options.add_argument("--prompts", type=int, nargs="+", default=[300, 700, 1500])
    options.add_argument("--alphas", type=float, nargs="+", default=[0.05, 0.1])
    options.add_argument("--shares", type=float, nargs="+", default=[0.2, 0.3, 0.4, 0.5, 0.6])
    options.add_argument("--draws", type=int, default=30)
    arguments = options.parse_args()
    asked = [
        (name, prompts, share, alpha)
        for name in arguments.controllers
        for prompts in arguments.prompts
        for alpha in arguments.alphas
        for share in arguments.shares
    ]
    rows = []
    for case in asked:
        rows.append(measured(*case, arguments.draws))
        print(*rows[-1].values(), sep=" | ", flush=True)
    result = {"settings": vars(arguments), "machine": machine(), "rows": rows}
    (RESULTS / "shares.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
