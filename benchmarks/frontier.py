"""The oracle's knapsack, to optimality, on many prompts and plans.

    python benchmarks/frontier.py

Random scores that rise with the budget, with noise: continuous ones and ones of 0 and 1. Times the best choice under a
mean budget and the cheapest choice for the full plan's mean score. The bound is the relaxation's, with mixtures of
plans, so the gap to it is at least the gap to the optimum. Writes benchmarks/results/frontier.json.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from oracle.frontier.frontier import budget_at
from oracle.frontier.knapsack import cheapest_choices
from oracle.frontier.sweep import path, sweep
from runtime.paired_timing import machine

Floats = NDArray[np.float64]

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=10_000)
    parser.add_argument("--plans", type=int, default=28)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    rows = []
    for kind in ("continuous", "binary"):
        scores, budgets = draw(kind, arguments.prompts, arguments.plans)
        rows.append(measure(kind, scores, budgets, arguments.rounds))
    result = {"settings": vars(arguments), "rows": rows, "machine": machine()}
    (RESULTS / "frontier.json").write_text(json.dumps(result, indent=2) + "\n")
    print(f"at most {max(row['seconds'] for row in rows)} s, {max(row['gap'] for row in rows):.1e} from the bound")


def draw(kind: str, n: int, k: int, seed: int = 0) -> tuple[Floats, Floats]:
    """Scores [n, k] and budgets [k]. Each prompt has a budget of its own, around which its plans become good."""
    draws = np.random.default_rng(seed)
    budgets = np.append(np.sort(draws.uniform(0.3, 0.99, k - 1)), 1.0)
    needed, reached = draws.beta(3, 2, (n, 1)), draws.uniform(0.3, 1.0, (n, 1))
    chance = reached / (1 + np.exp(-(budgets - needed) / 0.07))
    if kind == "binary":
        return (draws.random((n, k)) < chance).astype(np.float64), budgets
    return np.clip(chance + draws.normal(0.0, 0.05, (n, k)), 0.0, 1.0), budgets


def measure(kind: str, scores: Floats, budgets: Floats, rounds: int) -> dict[str, Any]:
    """The problem's median time, its objective, and how far that can be from the best possible."""
    points, full = path(sweep(scores, budgets), scores, budgets), float(scores[:, -1].mean())
    cheapest, seconds = timed(lambda: cheapest_choices(scores, budgets, full), rounds)
    budget, least = float(budgets[cheapest].mean()), budget_at(points, full)
    found = {"scores": kind, "problem": "least mean budget", "seconds": round(seconds, 2)}
    return {**found, "objective": budget, "bound": least, "gap": budget - least}


def timed(solve: Callable[[], NDArray[np.intp]], rounds: int) -> tuple[NDArray[np.intp], float]:
    """The choice, and the median seconds of several rounds."""
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        chosen = solve()
        seconds.append(time.perf_counter() - start)
    return chosen, median(seconds)


if __name__ == "__main__":
    main()
