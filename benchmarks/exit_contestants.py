"""Who keeps the score with fewer layers: the allocator, token exits, both together, or one plan for all?

The allocator and token exits are certified on prompts of the split `calibrate`, the static plan on `train` and `tune`,
which are labelled under every plan. All are measured on the same prompts of the split `test`. A contestant that cannot
be certified runs the full model.

Shapes: `n` prompts, `T` thresholds, safest first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from exit_material import AGREEMENTS, Material
from exit_times import by_plan, clocked, gate_costs
from numpy.typing import NDArray
from redrawn_splits import redrawn

from backbone.plan import LayerPlan
from controller.certificate.calibration import PRICES
from controller.certificate.risks import loss_scale, plan_losses
from oracle.chat import padded_prompts
from oracle.frontier.bootstrap import bootstrap_interval
from oracle.frontier.frontier import sufficient_plans
from oracle.labels.generation import answer_text, stop_token_ids
from oracle.labels.reader import key_of
from oracle.prompts import Prompt
from pipelines.evaluation.learning_table import Table
from pipelines.run.progress import progress
from pipelines.stages.evaluate import best_static
from runtime.allocator import Allocator
from token_exits.heads import ExitHeads
from token_exits.settings import ExitSettings, Strategy
from token_exits.thresholds import valid_step
from token_exits.token_exits import TokenExits

Floats = NDArray[np.float64]
Plans = Callable[[int, Table], list[LayerPlan]]
"""The plans of prompts at a step, below which tokens leave."""
ALPHAS = (0.02, 0.05, 0.1, 0.2)
DELTA = 0.1
BATCH = 32


@dataclass(frozen=True, eq=False)
class Contestant:
    """One way to answer, certified.

    Attributes:
        name: of the contestant.
        plans: of the test prompts, None for the full plan.
        scores, layers: of the test prompts [n]; layers that a token of the answer runs on average.
        prompt_layers: that the test prompts' own tokens run [n].
        certificate: what was tested, for JSON.
        step: the certified step; None where none is and all run the full model.
        exits: what lets tokens leave at that step; None for plans alone.
    """

    name: str
    plans: list[LayerPlan] | None
    scores: Floats
    layers: Floats
    prompt_layers: Floats
    certificate: dict[str, Any]
    step: int | None = None
    exits: TokenExits | None = None


class Comparison:
    """The contestants of one run.

    Args:
        material: of its token exits.
        prompts: at most, of the splits `calibrate` and `test` each.
        strategy: keys and values of the layers left out.
    """

    def __init__(self, material: Material, prompts: int, strategy: Strategy = "propagate") -> None:
        self.material, self._workspace, self._strategy = material, material.workspace, strategy
        self._plans = list(self._workspace.menu().plans)
        self.allocator = Allocator.from_pretrained(self._workspace.path("allocator"))
        only_full = np.arange(len(self._plans)) == len(self._plans) - 1
        cells = np.tile(only_full, (len(self._workspace.prompts.labelled_splits["calibrate"]), 1))
        calibrate = self._workspace.table("calibrate", wanted=cells)
        self.calibrate, self.test = (
            table.rows(np.arange(min(prompts, len(table.prompts))))
            for table in (calibrate, self._workspace.table("test"))
        )

    def contestants(self) -> list[Contestant]:
        """All of them, the full model first."""
        bridged, best = self.material.bridged, self.material.best_gate()
        found = [self._full(), self.static(), self.allocated()]
        found += [self.certified(f"{gate}, bridged", gate, bridged) for gate in self.material.gates]
        found.append(self.certified(f"{best}, frozen", best, self.material.frozen))
        if self._strategy != "recompute":  # which takes no plans
            found.append(self.certified(f"allocator and {best}, bridged", best, bridged, self._plans_below_prices()))
        return found

    def _full(self) -> Contestant:
        n_layers = np.full(len(self.test.prompts), float(self.material.n_layers))
        return Contestant("full", None, self.test.full, n_layers, n_layers, {})

    def static(self) -> Contestant:
        """The best plan for all."""
        best = best_static(self._workspace.config, self._workspace.table("train", "tune"), self.test)
        chosen = np.full(len(self.test.prompts), best)
        return self._with_plans("best static plan", chosen, {"plan": str(self._plans[best])})

    def allocated(self) -> Contestant:
        """The run's allocator."""
        found = self.allocator.certificate
        return self._with_plans("allocator", self._chosen(self.test, found.price, found.plan), asdict(found))

    def _with_plans(self, name: str, chosen: NDArray[np.intp], certificate: dict[str, Any]) -> Contestant:
        plans = [self._plans[index] for index in chosen]
        layers = np.array([float(plan.layers) for plan in plans])
        return Contestant(name, plans, self.test.scores[np.arange(len(chosen)), chosen], layers, layers, certificate)

    def _plans_below_prices(self) -> Plans:
        """Price and threshold take their steps together, both set on other splits: for each step the lowest price at
        which the controller expects at most its loss, on average over the split `tune`."""
        tune = self._workspace.table("tune")
        expected, rows = self._predicted(tune) / tune.unit, np.arange(len(tune.prompts))
        means = [float(expected[rows, self._chosen(tune, float(price))].mean()) for price in PRICES]
        fine = [[float(p) for p, mean in zip(PRICES, means, strict=True) if mean <= 1 - share] for share in AGREEMENTS]
        prices = [min(some, default=float(PRICES[0])) for some in fine]
        return lambda step, table: [self._plans[index] for index in self._chosen(table, prices[step])]

    def certified(self, name: str, gate: str, heads: ExitHeads, plans: Plans | None = None) -> Contestant:
        """Answers the calibrate prompts at each step, tests the steps, answers the test prompts at the valid one."""
        steps, n_layers, full = self.material.steps(gate, heads), self.material.n_layers, self.calibrate.full
        config, exits = self._workspace.config, [self._exits(gate, heads, threshold) for threshold in steps]
        seen = [self._answered(each, self.calibrate, step, plans) for step, each in enumerate(exits)]
        scores, layers = np.stack([each[0] for each in seen] + [full], axis=1), np.stack([each[1] for each in seen])
        sufficient = sufficient_plans(scores, config.label.tolerance)
        losses = plan_losses(config.calibration.risk, scores, sufficient).T
        terms: dict[str, Any] = {"risk": config.calibration.risk, "shortens": (layers < n_layers).any(axis=1)}

        def valid(alpha: float, delta: float) -> int | None:
            return valid_step(losses[:-1], full, alpha=alpha, delta=delta, groups=self.calibrate.groups, **terms)

        run = np.concatenate([layers, np.full((1, len(full)), n_layers)])
        certificate = {
            "thresholds": steps,
            "agreements": AGREEMENTS,
            "mean_losses": losses.mean(axis=1).tolist(),
            "mean_layers": layers.mean(axis=1).tolist(),
            "n": len(full),
            "bounds": {str(alpha): self._at(alpha, valid(alpha, DELTA), losses, run) for alpha in ALPHAS},
        }
        step = valid(config.calibration.alpha, config.calibration.delta)
        if step is None:
            return replace(self._full(), name=name, certificate=certificate)
        own, answered = plans and plans(step, self.test), self._answered(exits[step], self.test, step, plans)
        return Contestant(name, own, *answered, certificate, step, exits[step])

    def _at(self, alpha: float, step: int | None, losses: Floats, run: Floats) -> dict[str, Any]:
        """What a bound certifies, and how often it is broken in 500 redrawn splits; the last row is the full model."""
        risk, full, row = self._workspace.config.calibration.risk, self.calibrate.full, -1 if step is None else step
        budgets = run / self.material.n_layers
        violations = redrawn(losses, budgets, alpha, DELTA, len(full) // 2, 500, risk=risk, full=full)
        loss = float(losses[row].mean()) / loss_scale(risk, full)
        return {"step": step, "layers": float(run[row].mean()), "loss": loss, "redrawn": asdict(violations)}

    def _answered(
        self, exits: TokenExits, table: Table, step: int, plans: Plans | None
    ) -> tuple[Floats, Floats, Floats]:
        """Scores, layers a token and layers of the prompt, of a table's prompts [n], those of one plan together."""
        own = [None] * len(table.prompts) if plans is None else plans(step, table)
        found = np.zeros((2, len(own)))
        with progress(f"token exits, {exits.settings.gate.name}", len(own)) as advance:
            for plan, rows in by_plan(own).items():
                rows = sorted(rows, key=lambda row: len(table.prompts[row].prompt))
                for some in (rows[start : start + BATCH] for start in range(0, len(rows), BATCH)):
                    found[:, some] = self._batch(exits, [table.prompts[row] for row in some], plan)
                    advance(len(some))
        of_prompts = [float(self.material.n_layers if plan is None else plan.layers) for plan in own]
        return found[0], found[1], np.array(of_prompts)

    def _batch(self, exits: TokenExits, prompts: Sequence[Prompt], plan: LayerPlan | None) -> Floats:
        """Scores and layers a token [2, rows] of a batch of prompts."""
        model, tokenizer = self._workspace.model.loaded
        decoding = self._workspace.model.decoding.of(model, tokenizer)
        stops, inputs = stop_token_ids(tokenizer, decoding), padded_prompts(tokenizer, [p.prompt for p in prompts])
        options = {**decoding.arguments(tokenizer, list(stops)), "plan": plan, "return_dict_in_generate": True}
        output: Any = exits.generate(model, **inputs.to(model.device), **options)
        full, found = self._workspace.labels.labels(self._plans[-1], prompts), []
        rows = output.sequences[:, inputs["input_ids"].shape[1] :].tolist()
        for prompt, ids, layers in zip(prompts, rows, output["layers_run"].tolist(), strict=True):
            n_tokens = next((i + 1 for i, token in enumerate(ids) if token in stops), len(ids))
            text = answer_text(tokenizer, ids[:n_tokens], decoding)
            found.append((prompt.score_or_zero(text, full[key_of(prompt)].answer), np.mean(layers[:n_tokens])))
        return np.array(found).T

    def _exits(self, gate: str, heads: ExitHeads, threshold: float) -> TokenExits:
        own = self.material.gate(gate, heads)
        return TokenExits(ExitSettings(own, heads, self.material.depths, threshold, self._strategy))

    def _chosen(self, table: Table, price: float, plan: int | None = None) -> NDArray[np.intp]:
        return replace(table.rule, plan=plan).choose(self._predicted(table), price)

    def _predicted(self, table: Table) -> NDArray[np.float32]:
        """Losses that are expected, with the outlier test that the certificate covers."""
        return self.allocator.selector().predictor.predict(table.features)


def compared(comparison: Comparison, batches: Sequence[int]) -> dict[str, Any]:
    """Quality, layers and times of every contestant, and what each bound would certify."""
    found, calibration = comparison.contestants(), comparison.material.workspace.config.calibration
    rows = [described(each, found[0].scores) for each in found]
    for row, times in zip(rows, clocked(comparison, found, batches), strict=True):
        row["speed"] = times
    return {
        "contestants": rows,
        "depths": comparison.material.depths,
        "prompts": {"calibrate": len(comparison.calibrate.prompts), "test": len(comparison.test.prompts)},
        "gates": gate_costs(comparison.material, batches),
        "training": comparison.material.training,
        "risk": calibration.risk,
        "alpha": calibration.alpha,
        "n_layers": comparison.material.n_layers,
    }


def described(each: Contestant, full: Floats) -> dict[str, Any]:
    """For JSON: means over the test prompts, the quality as a share of the full model's, with intervals (90%)."""

    def ratio(picked: NDArray[np.intp]) -> float:
        return float(each.scores[picked].mean() / full[picked].mean()) if full[picked].mean() else float("nan")

    return {
        "name": each.name,
        "quality": float(each.scores.mean()),
        "quality_ratio": ratio(np.arange(len(full))),
        "quality_interval": bootstrap_interval(ratio, len(full)),
        "layers_a_token": float(each.layers.mean()),
        "layers_interval": bootstrap_interval(lambda picked: float(each.layers[picked].mean()), len(full)),
        "prompt_layers": float(each.prompt_layers.mean()),
        "step": each.step,
        "certificate": each.certificate,
    }
