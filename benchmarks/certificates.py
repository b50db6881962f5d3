"""How often a certificate is broken, on simulated prompts whose true loss is known.

    python benchmarks/certificates.py

Each case draws calibration prompts many times. The functions of the stage `calibrate` find a price for each draw. The
price is broken if its true mean loss exceeds the bound. That may happen in a share delta of the draws. The true loss is
known for each prompt, and averaged over a large population of what controllers see. Losses grow along the prices from
nothing to twice the bound or more, so that every price found is near the boundary. Where a case has a wrong way to
calibrate, the same draws are calibrated that way too. Writes benchmarks/results/certificates.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from prices import price_of
from scipy.stats import binomtest

from controller.base import ChoiceRule
from controller.certificate.risks import Risk, plan_losses
from controller.features import Features
from controller.learning import Settings, learn
from oracle.prompts import Prompt
from pipelines.config.learning_sections import CalibrationSection
from pipelines.evaluation.learning_table import Table
from pipelines.run.progress import progress
from runtime.paired_timing import machine

Floats = NDArray[np.float64]
Random = np.random.Generator

RESULTS = Path(__file__).parent / "results"
BUDGETS = np.array([0.5, 1.0])
DELTA = 0.1
POPULATION = 200_000
"""Prompts that stand for the population."""


@dataclass(frozen=True, slots=True)
class Draw:
    """`n` prompts.

    Attributes:
        predicted: what each controller expects the two plans to keep [C, n, 2].
        scores: under the two plans [n, 2]; NaN where the judge failed.
        groups: group of each prompt [n].
        lost: what the shortened plan loses on average on such a prompt [n].
    """

    predicted: NDArray[np.float32]
    scores: Floats
    groups: NDArray[np.intp]
    lost: Floats

    def table(self, risk: Risk) -> Table:
        """The prompts as the stages see them, with the predictions for features; those of a group have one text."""
        texts = [f"text {group}" for group in self.groups]
        prompts = [Prompt(str(row), "simulated", text, "", "exact") for row, text in enumerate(texts)]
        features = {str(place): expected for place, expected in enumerate(self.predicted)}
        return Table.of(prompts, self.scores, features, BUDGETS, risk)


@dataclass(frozen=True)
class Case:
    """One kind of prompts and of calibration.

    Attributes:
        name: in the table.
        draw: n prompts.
        alphas: bounds that are certified side by side; at each the controller that runs least is taken.
        risk: which loss.
        n: calibration prompts.
        unit: the full model's mean score for `mean_score`, else 1.
        wrong: what a wrong way makes of the table, if there is one.
        times: this many times as many draws, where the bound is broken nearly as often as it may be.
    """

    name: str
    draw: Callable[[Random, int], Draw]
    alphas: tuple[float, ...] = (0.05,)
    risk: Risk = "mean_score"
    n: int = 200
    unit: float = 1.0
    wrong: Callable[[Table], Table] | None = None
    times: int = 1

    def prices(self, table: Table, together: bool) -> dict[float, tuple[int, float]]:
        """Bound -> the controller that runs least there, with its price; all share delta if they are `together`."""
        places, settings = range(len(table.features)), CalibrationSection(delta=DELTA, risk=self.risk)
        count, found = len(places) * len(self.alphas) if together else 1, {}
        for alpha in self.alphas:
            budgets = {}
            for place in places:
                predicted = table.features[str(place)]
                if (price := price_of(predicted, table, settings, 1 - alpha, together=count)) is not None:
                    budgets[place, price] = BUDGETS[table.rule.choose(predicted, price)].mean()
            if budgets:
                found[alpha] = min(budgets, key=lambda key: budgets[key])
        return found

    def true_loss(self) -> Callable[[int, float], float]:
        """(controller, price) -> mean loss of the population, in the unit of the bounds."""
        drawn = self.draw(np.random.default_rng(0), POPULATION)

        @lru_cache
        def of(place: int, price: float) -> float:
            shortened = ChoiceRule(BUDGETS, self.risk).choose(drawn.predicted[place], price) == 0
            return float((drawn.lost * shortened).mean() / self.unit)

        return of


def measured(case: Case, repetitions: int, advance: Callable[[int], None] = lambda done: None) -> dict[str, Any]:
    """A row of the table: shares of the draws that found a price and that broke a bound, right and wrong."""
    random, loss = np.random.default_rng(1), case.true_loss()

    def broken(found: dict[float, tuple[int, float]]) -> bool:
        return any(loss(*chosen) > alpha for alpha, chosen in found.items())

    seen, wrong, certified = [], [], 0
    for _ in range(repetitions):
        drawn = case.draw(random, case.n)
        table = drawn.table(case.risk)
        found = case.prices(table, together=True)
        seen.append(broken(found))
        certified += bool(found)
        if case.wrong is not None:
            wrong.append(broken(case.prices(case.wrong(table), together=False)))
        advance(1)
    interval = binomtest(sum(seen), repetitions).proportion_ci(0.95, method="exact")
    return {
        "case": case.name,
        "risk": case.risk,
        "alphas": case.alphas,
        "prompts": case.n,
        "draws": repetitions,
        "certified": certified / repetitions,
        "broken": float(np.mean(seen)),
        "low": float(interval.low),
        "high": float(interval.high),
        "broken_wrong_way": float(np.mean(wrong)) if wrong else None,
    }


def drawn(expected: Floats, full: Floats, plan: Floats, lost: Floats | float, copies: int = 1) -> Draw:
    """Prompts, `copies` of each, whose controllers expect some losses [C, n] of the shortened plan."""
    predicted = np.stack([expected, np.zeros_like(expected)], axis=-1).astype(np.float32)
    rows = np.repeat(np.arange(len(full)), copies)
    return Draw(predicted[:, rows], np.stack([plan, full], axis=1)[rows], rows, np.broadcast_to(lost, len(rows)))


def ignorant(random: Random, n: int, controllers: int = 1) -> Floats:
    """Expected losses [C, n] that know nothing: each price shortens its share of the prompts."""
    return np.exp(random.uniform(np.log(0.01), 0.0, (controllers, n)))


def noise(random: Random, n: int) -> Draw:
    """Scores of the plan are the full model's, less a tenth, with noise."""
    full = random.uniform(0.3, 0.7, n)
    plan = 0.9 * full + random.uniform(-0.25, 0.25, n)
    return drawn(ignorant(random, n), full, plan, 0.1 * full)


def rare_loss(
    random: Random, n: int, rate: float = 0.1, score: float = 0.0, copies: int = 1, controllers: int = 1
) -> Draw:
    """The plan's answers are right as the full model's, but for a few that are lost altogether, with another score."""
    plan = np.where(random.random(n // copies) < rate, score, 1.0)
    return drawn(ignorant(random, len(plan), controllers), np.ones(len(plan)), plan, rate, copies)


def wins_and_losses(random: Random, n: int) -> Draw:
    """Half of the answers change; a changed one is right in 48% of the cases, the full model's in 60%."""
    full, right = (random.random(n) < 0.6).astype(float), (random.random(n) < 0.48).astype(float)
    return drawn(ignorant(random, n), full, np.where(random.random(n) < 0.5, right, full), 0.06)


def learnable() -> Callable[[Random, int], Draw]:
    """Draws that a controller decides about which learned from 300 others; the full model is right on 80%."""

    def states(random: Random, n: int) -> tuple[Features, Floats, Floats]:
        found = random.normal(size=(n, 4)).astype(np.float32)
        full, chance = (random.random(n) < 0.8).astype(float), 1 / (1 + np.exp(-1 - 2 * found[:, 0]))
        return {"states": found}, np.stack([full * (random.random(n) < chance), full], axis=1), 0.8 * (1 - chance)

    features, scores, _ = states(np.random.default_rng(2), 300)
    losses = plan_losses("mean_score", scores, scores >= scores[:, -1:])
    learned = learn(Settings("logistic", ("states",), 4), features, losses, BUDGETS)

    def draw(random: Random, n: int) -> Draw:
        features, scores, lost = states(random, n)
        return Draw(learned.predict(features)[None], scores, np.arange(n), lost)

    return draw


def without_failures(table: Table) -> Table:
    """Only the prompts that the judge read under both plans: here those that were lost are those that it failed on."""
    return table.rows(np.flatnonzero(table.scores[:, 0] > 0))


def each_apart(table: Table) -> Table:
    """Every prompt as if it were a draw of its own."""
    return replace(table, prompts=[replace(prompt, prompt=prompt.id) for prompt in table.prompts])


def cases() -> list[Case]:
    """All of them; those in which a choice is made afterwards are wrong where each price takes delta for itself."""
    two, fails = partial(rare_loss, controllers=2), partial(rare_loss, rate=0.2, score=np.nan)
    five, often = partial(rare_loss, rate=0.2, copies=5), partial(rare_loss, rate=0.2)
    return [
        Case("noise", noise, unit=0.5),
        Case("rare total loss", rare_loss, risk="score_lost", times=3),
        Case("wins and losses", wins_and_losses, unit=0.6),
        Case("learnable", learnable(), unit=0.8),
        Case("judge fails on 20%", fails, (0.03,), wrong=without_failures),
        Case("groups of five", five, (0.1,), "score_lost", 400, wrong=each_apart, times=3),
        Case("better of two controllers", two, risk="score_lost", wrong=lambda table: table),
        Case("any of 3 / 5 / 8%", often, (0.03, 0.05, 0.08), "score_lost", wrong=lambda table: table),
    ]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--repetitions", type=int, default=500, help="draws of each case")
    arguments = options.parse_args()
    asked = cases()
    with progress("draws", sum(case.times for case in asked) * arguments.repetitions) as advance:
        rows = [measured(case, case.times * arguments.repetitions, advance) for case in asked]
    result = {"settings": vars(arguments), "machine": machine(), "delta": DELTA, "rows": rows}
    (RESULTS / "certificates.json").write_text(json.dumps(result, indent=2) + "\n")
    print(results_table(rows))


def results_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The cases in Markdown."""
    lines = ["| case | prompts | certified | bound broken | the wrong way |", "| --- | --- | --- | --- | --- |"]
    for row in rows:
        broken = f"{row['broken']:.1%} ({row['low']:.1%} to {row['high']:.1%})"
        wrong = "" if row["broken_wrong_way"] is None else f"{row['broken_wrong_way']:.1%}"
        lines.append(f"| {row['case']} | {row['prompts']} | {row['certified']:.1%} | {broken} | {wrong} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
