"""What controllers capture of the headroom, whether their certificate holds, and what they cost in time.

    python benchmarks/controllers.py --run runs/demo --name demo

Reads a finished run. All of its prompts are predicted out of fold by every controller and every control, with the
settings that the run found, and a price is picked on one random half of them and measured on the other, both ways: more
prompts than a test split, and none of them seen. For every risk the certificate is made anew on random splits of such
predictions, and on simulated losses whose mean is known. Times are of this machine, a decision against the prefill and
64 new tokens of one of the run's prompts. Writes benchmarks/results/controllers-NAME.json.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import workload
from numpy.typing import NDArray
from redrawn_splits import resampled_violations

from backbone.plan import LayerPlan
from controller.base import ChoiceRule, Floats
from controller.certificate.calibration import PricePath, valid_price
from controller.certificate.risks import RISKS, Risk
from controller.learning import Settings, learn
from controller.report.headroom import captured_by
from controller.report.report_card import regret
from oracle.chat import padded_prompts
from pipelines.config import Config, load_config
from pipelines.config.learning_sections import TuningSection
from pipelines.evaluation.controls import CONTROLS, control_features, control_settings, priced_on_halves
from pipelines.evaluation.learning_table import Table
from pipelines.evaluation.speed import feature_ms, generation_under
from pipelines.run.workspace import Workspace
from pipelines.stages.settings_search import Search, Work, search
from pipelines.stages.train import out_of_fold, tuned_settings
from runtime.allocator import Allocator
from runtime.paired_timing import median_seconds

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--run", type=Path, default=Path("runs/demo"), help="folder of a finished run")
    options.add_argument("--name", default="demo", help="name in the result's file")
    options.add_argument("--alphas", type=float, nargs="+", default=[0.01, 0.02, 0.05, 0.1])
    options.add_argument("--splits", type=int, default=500)
    options.add_argument("--new-tokens", type=int, default=64)
    options.add_argument("--tuning-prompts", type=int, default=5000, help="0 leaves the tuning out")
    options.add_argument("--tuning-trials", type=int, default=100)
    options.add_argument("--workers", type=int, default=2)
    arguments = options.parse_args()
    config = load_config(arguments.run / "config.yaml")
    config = config.model_copy(update={"runs": arguments.run.parent, "name": arguments.run.name})
    workspace = Workspace(config)
    table = workload.table_in_full(workspace)
    settings = tuned_settings(workspace)
    predicted = predictions(config, table, settings)
    result = {
        "prompts": len(table.prompts),
        "captured": [row for alpha in arguments.alphas for row in captured(predicted, table, alpha)],
        "regret": {
            name: regret(expected, table.losses, table.rule, [alpha * table.unit for alpha in arguments.alphas])
            for name, expected in predicted.items()
        },
        "certificate": [row for risk in RISKS for row in certificates(config, risk, settings, arguments)],
        "simulated": [simulated(risk, n, arguments.splits) for risk in RISKS for n in (100, 250, 1000)],
        "milliseconds": milliseconds(workspace, table, settings, arguments.new_tokens),
        "tuning": tuning(arguments) if arguments.tuning_prompts else None,
    }
    model = {"model": workspace.config.model.source, "data": workspace.config.data.path}
    workload.write(
        RESULTS / f"controllers-{arguments.name}.json",
        argparse.Namespace(**vars(arguments) | model | {"run": arguments.run.name}),
        result,
    )


def predictions(config: Config, table: Table, settings: Mapping[str, Settings]) -> dict[str, Floats]:
    """What each controller and each control expects of prompts it did not see."""
    best = settings[best_of(config)]
    found = {name: out_of_fold(own, table.features, table) for name, own in settings.items()}
    for name in CONTROLS:
        features, sets = control_features(name, table, best.sets)
        found[name] = out_of_fold(control_settings(best, sets, config.tuning), features, table)
    return found


def best_of(config: Config) -> str:
    return Allocator.from_pretrained(config.folder / "allocator").controller_name


def captured(predicted: Mapping[str, Floats], table: Table, alpha: float) -> list[dict[str, Any]]:
    """What each policy captures at a mean loss, with the price picked on the other half of the prompts."""
    chosen = {name: priced_on_halves(expected, table, alpha) for name, expected in predicted.items()}
    found, rows = captured_by(chosen, table.scores, table.budgets, frozenset(CONTROLS)), np.arange(len(table.prompts))
    return [
        {
            "alpha": alpha,
            "policy": name,
            "budget": float(table.budgets[choice].mean()),
            "loss": float(table.losses[rows, choice].mean()) / table.unit,
            **asdict(found[name]),
        }
        for name, choice in chosen.items()
    ]


def certificates(
    config: Config, risk: Risk, settings: Mapping[str, Settings], arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """How often a certificate of a risk is broken over random splits of the prompts, at each bound; controllers learn
    for that risk, with the settings that were found for the run's."""
    calibration = config.calibration.model_copy(update={"risk": risk})
    table = workload.table_in_full(Workspace(config.model_copy(update={"calibration": calibration})))

    def violations(expected: Floats, alpha: float) -> dict[str, Any]:
        sizes = (len(table.prompts) // 2, arguments.splits)
        found = resampled_violations(
            expected, table.losses, table.rule, alpha, calibration.delta, *sizes, full=table.full
        )
        return asdict(found)

    predicted = {name: out_of_fold(own, table.features, table) for name, own in settings.items()}
    return [
        {"risk": risk, "controller": name, "alpha": alpha, **violations(expected, alpha)}
        for name, expected in predicted.items()
        for alpha in arguments.alphas
    ]


def simulated(risk: Risk, n: int, repeats: int, alpha: float = 0.05, delta: float = 0.1) -> dict[str, Any]:
    """Where the truth is known: a shortened plan whose mean loss is `alpha` to a hair above, so that every certificate
    which lets a prompt run it is wrong, and may be given with probability `delta` at most."""
    random, rule, wrong = np.random.default_rng(0), ChoiceRule(np.array([0.5, 1.0]), risk), 0
    expected = np.tile(np.array([[0.1, 0.0]], dtype=np.float32), (n, 1))
    for _ in range(repeats):
        lost, full = _simulated_losses(random, risk, n, alpha * 1.001)
        losses = np.column_stack([lost, np.zeros(n)])
        price = valid_price(PricePath.of(expected, losses, rule), alpha, delta, risk=risk, full=full)
        wrong += price is not None
    return {"risk": risk, "n": n, "alpha": alpha, "delta": delta, "repeats": repeats, "violations": wrong / repeats}


def _simulated_losses(
    random: np.random.Generator, risk: Risk, n: int, mean: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Losses and the full model's scores [n], with a mean loss in the risk's unit. For `mean_score` the full model is
    right on .6 of the prompts, and half of the answers change."""
    full = (random.random(n) < 0.6).astype(np.float64)
    if risk == "mean_score":
        changed, right = random.random(n) < 0.5, random.random(n) < 0.6 * (1 - mean / 0.5)
        return np.where(changed, full - right, 0.0), full
    if risk == "insufficient":
        return (random.random(n) < mean).astype(np.float64), full
    return random.beta(0.3, 0.3 * (1 / mean - 1), n), full


def milliseconds(
    workspace: Workspace, table: Table, settings: Mapping[str, Settings], new_tokens: int
) -> dict[str, Any]:
    """A row's prediction by each controller on one thread, features, and both against stock generation."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        one = {name: values[:1] for name, values in table.features.items()}
        learned = {name: learn(own, table.features, table.losses, table.budgets) for name, own in settings.items()}
        rows = median_seconds(
            {name: lambda found=found: found.predict(one) for name, found in learned.items()}, 50, _no
        )  # type: ignore[misc]
    finally:
        torch.set_num_threads(threads)
    model, tokenizer = workspace.model.loaded
    text = sorted((prompt.prompt for prompt in table.prompts), key=len)[len(table.prompts) // 2]
    inputs = dict(padded_prompts(tokenizer, [text]).to(model.device))
    full = LayerPlan.full(workspace.menu().n_layers)
    stock = median_seconds({"stock": generation_under(model, inputs, full, new_tokens, None)}, 3, _no)["stock"] * 1000
    features = feature_ms(workspace, text, 10)
    sets = settings[best_of(workspace.config)].sets
    decision = sum(features[name] for name in sets) + rows[best_of(workspace.config)] * 1000
    return {
        "prediction": {name: round(seconds * 1000, 3) for name, seconds in rows.items()},
        "features": features,
        "decision": round(decision, 3),
        "generation": round(stock, 1),
        "prompt_tokens": int(inputs["attention_mask"].sum()),
        "new_tokens": new_tokens,
        "decision_share": round(decision / stock, 5),
    }


def _no() -> None:
    """Nothing to report."""


def tuning(arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a search on random prompts, half the trials LightGBM and half the MLP."""
    random, n, k = np.random.default_rng(0), arguments.tuning_prompts, 8
    states = random.normal(size=(n, 1280)).astype(np.float32)
    needed = 0.2 * states[:, :1] + np.linspace(-1, 1.5, k)
    losses = np.clip(0.5 - needed, 0, 1)
    losses[:, -1] = 0
    features = {"length": states[:, :1].copy(), "path": states[:, 1:19].copy(), "states": states}
    trials = arguments.tuning_trials // 2
    section = TuningSection(trials=trials, workers=arguments.workers, feature_sets=[["length", "path", "states"]])
    work, seconds = Work(features, losses, ChoiceRule(np.linspace(0.5, 1, k), "score_lost"), (0.02,), section), {}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("lightgbm", "mlp"):
            start = time.perf_counter()
            search(Search(f"sqlite:///{folder}/tuning.db", name, name), work, lambda done: None)
            seconds[name] = round(time.perf_counter() - start, 1)
    return {"prompts": n, "plans": k, "trials_each": trials, "folds": section.folds, "seconds": seconds}


if __name__ == "__main__":
    main()
