"""Who keeps the score with fewer layers: the allocator, token exits, both together, or one plan for all?

The allocator and token exits are certified on prompts of the split `calibrate`, the static plan on `train` and `tune`,
which are labelled under every plan. All are measured on the same prompts of the split `test`. A contestant that cannot
be certified runs the full model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backbone.plan import LayerPlan
from controller.base import choose, lost
from controller.certificate.calibration import PRICES, cheapest_valid_plan
from controller.learning import Learned
from oracle.frontier.bootstrap import bootstrap_interval
from oracle.labels.reader import key_of
from pipelines.exit_comparison.answers import ExitAnswers
from pipelines.exit_comparison.material import Material
from pipelines.learning_table import Table
from pipelines.workspace import Workspace
from runtime.allocator import Allocator
from runtime.token_exits.certifying import losses_of, valid_step
from runtime.token_exits.heads import ExitHeads
from runtime.token_exits.settings import ExitSettings
from runtime.token_exits.token_exits import TokenExits

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Contestant:
    """One way to answer, certified.

    Attributes:
        name: in the report.
        step: the certified step; None where none is and all run the full model.
        exits: what lets tokens leave at that step; None for plans alone.
        plans: of the test prompts, None for the full plan.
        scores, layers: of the test prompts [n]; layers that a token of the answer runs on average.
        prompt_layers: that the test prompts' own tokens run [n].
        certificate: what was tested, for JSON.
    """

    name: str
    step: int | None
    exits: TokenExits | None
    plans: list[LayerPlan] | None
    scores: Floats
    layers: Floats
    prompt_layers: Floats
    certificate: dict[str, Any]


class Comparison:
    """The contestants of one run."""

    def __init__(self, workspace: Workspace) -> None:
        self._workspace, self._settings = workspace, workspace.config.token_exits
        self.material, self._calibration = Material(workspace), workspace.config.calibration
        self._budget_plans = list(workspace.menu().plans)
        self.test, self.fit = self._limited(workspace.table("test")), workspace.table("train", "tune")
        only_full = np.arange(len(self._budget_plans)) == len(self._budget_plans) - 1
        cells = np.tile(only_full, (len(workspace.labelled_splits["calibrate"]), 1))
        self.calibrate = self._limited(workspace.table("calibrate", wanted=cells))
        self._answers = ExitAnswers(
            workspace.path("exit_answers.jsonl"),
            *workspace.adapted,
            workspace.decoding,
            self._settings.batch_size,
            self._full_answers(),
        )

    def contestants(self) -> list[Contestant]:
        """All of them, the full model first."""
        found = [self._full(), self._static(), self._allocator()]
        found += [self._exits(gate, "bridged") for gate in self._settings.gates]
        best = self.best_gate()
        found.append(self._exits(best, "frozen"))
        if self._settings.strategy != "recompute":  # which takes no plans
            found.append(self._both(best))
        return found

    def best_gate(self) -> str:
        """The gate of the fewest layers at equal agreement on the held-out tokens, which are of no test prompt."""
        return min(self._settings.gates, key=lambda gate: self.material.held_out_layers(gate, self.material.bridged))

    def _limited(self, table: Table) -> Table:
        return table.rows(np.arange(min(self._settings.prompts, len(table.prompts))))

    def _full_answers(self) -> dict[str, str]:
        prompts = [*self.calibrate.prompts, *self.test.prompts]
        labels = self._workspace.labels.labels(self._budget_plans[-1], prompts)
        return {prompt.id: labels[key_of(prompt)].answer for prompt in prompts}

    def _full(self) -> Contestant:
        n_layers = np.full(len(self.test.prompts), float(self.material.n_layers))
        return Contestant("full", None, None, None, self.test.full, n_layers, n_layers, {})

    def _static(self) -> Contestant:
        settings = self._calibration
        best = cheapest_valid_plan(
            self.fit.losses,
            settings.alpha,
            settings.delta,
            settings.risk,
            expected=self.test.losses.mean(axis=0),
            full=self.fit.full,
            groups=self.fit.groups,
        )
        return self._with_plans(
            "best static plan", np.full(len(self.test.prompts), best), {"plan": str(self._budget_plans[best])}
        )

    def _allocator(self) -> Contestant:
        allocator = Allocator.from_pretrained(self._workspace.path("allocator"))
        chosen = choose(self._predicted(allocator, self.test), self.test.budgets, allocator.certificate.price)
        return self._with_plans("allocator", chosen, asdict(allocator.certificate))

    def _with_plans(self, name: str, chosen: NDArray[np.intp], certificate: dict[str, Any]) -> Contestant:
        plans = [self._budget_plans[index] for index in chosen]
        layers = np.array([float(plan.layers) for plan in plans])
        scores = self.test.scores[np.arange(len(chosen)), chosen]
        return Contestant(name, None, None, plans, scores, layers, layers, certificate)

    def _exits(self, gate: str, heads: str) -> Contestant:
        own: ExitHeads = getattr(self.material, heads)
        thresholds = self.material.steps(self.material.gate(gate, own), own)
        return self._certified(f"{gate}, {heads}", gate, own, thresholds, None)

    def _both(self, gate: str) -> Contestant:
        """The allocator's plan as the ceiling, exits below it: price and threshold take their steps together, both set
        on other splits."""
        own, allocator = self.material.bridged, Allocator.from_pretrained(self._workspace.path("allocator"))
        thresholds = self.material.steps(self.material.gate(gate, own), own)
        prices = [self._price(allocator, 1 - wanted) for wanted in self._settings.agreements]

        def plans(step: int, table: Table) -> list[LayerPlan]:
            chosen = choose(self._predicted(allocator, table), table.budgets, prices[step])
            return [self._budget_plans[index] for index in chosen]

        return self._certified(f"allocator and {gate}, bridged", gate, own, thresholds, plans)

    def _price(self, allocator: Allocator, loss: float) -> float:
        """The lowest price at which the controller expects at most this loss, on average over the split `tune`."""
        table = self._workspace.table("tune")
        predicted = self._predicted(allocator, table)
        expected = lost(predicted)
        means = [expected[np.arange(len(expected)), choose(predicted, table.budgets, float(p))].mean() for p in PRICES]
        fine = [float(price) for price, mean in zip(PRICES, means, strict=True) if mean <= loss * table.unit]
        return min(fine, default=float(PRICES[0]))

    def _certified(
        self,
        name: str,
        gate: str,
        heads: ExitHeads,
        thresholds: Sequence[float],
        plans: Callable[[int, Table], list[LayerPlan]] | None,
    ) -> Contestant:
        """Answers the calibrate prompts at each step, tests the steps, answers the test prompts at the valid one."""
        answered = partial(self._answered, name, gate, heads, thresholds, plans)
        seen = [answered(self.calibrate, step) for step in range(len(thresholds))]
        scores, layers = (np.stack([each[part] for each in seen]) for part in (0, 1))
        settings, full = self._calibration, self.calibrate.full
        losses = losses_of(settings.risk, scores, full, self._workspace.config.label.tolerance)
        step = valid_step(
            losses,
            full,
            alpha=settings.alpha,
            delta=settings.delta,
            risk=settings.risk,
            groups=self.calibrate.groups,
            shortens=np.asarray((layers < self.material.n_layers).any(axis=1)),
        )
        certificate = {
            "thresholds": list(thresholds),
            "agreements": list(self._settings.agreements),
            "mean_losses": losses.mean(axis=1).tolist(),
            "mean_layers": layers.mean(axis=1).tolist(),
            "n": len(full),
            "losses": losses.round(6).tolist(),
            "layers": layers.round(4).tolist(),
            "full": full.tolist(),
        }
        if step is None:
            return replace(self._full(), name=name, certificate=certificate)
        test_scores, test_layers, prompt_layers = answered(self.test, step)
        own = None if plans is None else plans(step, self.test)
        exits = self._made(gate, heads, thresholds[step])
        return Contestant(name, step, exits, own, test_scores, test_layers, prompt_layers, certificate)

    def _answered(
        self,
        name: str,
        gate: str,
        heads: ExitHeads,
        thresholds: Sequence[float],
        plans: Callable[[int, Table], list[LayerPlan]] | None,
        table: Table,
        step: int,
    ) -> tuple[Floats, Floats, Floats]:
        """Scores, layers a token and layers of the prompt, of a table's prompts at a step [n]."""
        own = None if plans is None else plans(step, table)
        make = partial(self._made, gate, heads, thresholds[step])
        parts = [thresholds[step], self._settings.strategy, self._settings.decay, self.material.depths]
        key = f"{name}: {self.material.digest(gate, heads)} {parts}"
        answers = self._answers.of(key, make, table.prompts, own)
        layers = np.array([float(np.mean(answer.layers)) for answer in answers])
        of_prompts = [self.material.n_layers if own is None else plan.layers for plan in own or table.prompts]  # type: ignore[union-attr]
        return np.array([answer.score for answer in answers]), layers, np.array(of_prompts, dtype=np.float64)

    def _made(self, gate: str, heads: ExitHeads, threshold: float) -> TokenExits:
        settings = self._settings
        return TokenExits(
            ExitSettings(
                self.material.gate(gate, heads),
                heads,
                self.material.depths,
                threshold,
                settings.strategy,
                settings.decay,
            )
        )

    def _predicted(self, allocator: Allocator, table: Table) -> NDArray[np.float32]:
        """What plans are expected to keep, with the outlier test that the certificate covers."""
        full = float(table.kept[0, -1])
        learned = Learned(allocator.projection, allocator.controller, full, allocator.outliers)
        return learned.predict(table.features)


def described(found: Sequence[Contestant]) -> list[dict[str, Any]]:
    """For JSON: means over the test prompts, the quality as a share of the full model's with its interval (90%)."""
    full = found[0].scores
    rows = []
    for each in found:

        def ratio(picked: NDArray[np.intp], scores: Floats = each.scores) -> float:
            return float(scores[picked].mean() / full[picked].mean()) if full[picked].mean() else float("nan")

        everyone = np.arange(len(full))
        rows.append(
            {
                "name": each.name,
                "quality": float(each.scores.mean()),
                "quality_ratio": ratio(everyone),
                "quality_interval": bootstrap_interval(ratio, len(full)),
                "layers_a_token": float(each.layers.mean()),
                "layers_interval": bootstrap_interval(lambda i, x=each.layers: float(x[i].mean()), len(full)),  # type: ignore[misc]
                "prompt_layers": float(each.prompt_layers.mean()),
                "step": each.step,
                "certificate": each.certificate,
            }
        )
    return rows
