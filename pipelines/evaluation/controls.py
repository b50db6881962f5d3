"""Do the controllers know the prompt? Controllers and controls, which know less, at equal losses.

Shapes: `N` prompts, `K` plans, `T` prices.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from controller.base import FittedPredictor, Floats
from controller.certificate.calibration import PRICES
from controller.certificate.certificate import alpha_of
from controller.features import Features, rows_of
from controller.learning import Settings, learn
from controller.report.headroom import Curve, captured_by, gains
from controller.report.report_card import price_for_loss
from pipelines.config.learning_sections import TuningSection
from pipelines.evaluation.learning_table import Table
from pipelines.run.progress import Omissions, progress
from pipelines.run.prompts import IN_FULL
from pipelines.run.workspace import Workspace
from pipelines.stages.calibrate import priced_out_of_fold
from pipelines.stages.settings_search import default_settings
from pipelines.stages.train import load_trained, out_of_fold, tuned_settings
from runtime.parts import AllocatorParts

Choices = NDArray[np.intp]

CONTROLS = ("shuffled", "task", "embedding")
"""Controllers of the best one's kind, at default settings, with features that know less: another prompt's, the task's
name alone, the mean embedding alone. One that nothing can be learned from, such as a single task's name, is left out
by name."""
BLIND = ("shuffled", "task")
"""Controls that do not look at the prompt."""
STEP = 8
"""Every so many of the prices of a rival are looked at; mixtures of them fill the gaps."""


def comparison(
    workspace: Workspace,
    best: str,
    expected: Mapping[str, Floats],
    fit: Table,
    test: Table,
    allocator: AllocatorParts,
    left_out: Omissions,
) -> tuple[dict[str, Any], Choices | None]:
    """What is captured at each of `calibration.keep`, by controllers and controls.

    A price is picked out of fold on the prompts to train and to tune so that the mean loss there is the bound, without
    a guarantee, which would make up for different policies' noise by different margins; then the test split is
    measured, without the outlier test, which is not about knowing the prompt. `pooled` is what the best controller
    gains on all prompts that are labelled in full, each of which it expects something of without having seen it.

    Args:
        workspace: of the run.
        best: name of the controller that the allocator has.
        expected: of each controller, what it expects out of fold of the prompts to train and to tune, `fit`.
        fit, test: what is learned from, and what is measured.
        allocator: whose bound and outlier test the task's name gets too.
        left_out: takes the names of what cannot be made.

    Returns:
        This, and the plans of the test prompts by the name of the task alone, with the allocator's outlier test and
        bound; None where nothing can be learned from names.
    """
    config, shown = workspace.config, with_task(test, fit.tasks)
    controls = _controls(tuned_settings(workspace)[best], fit, config.tuning, left_out)
    policies = {name: (expected[name], each) for name, each in load_trained(workspace).items()} | controls
    predicted = {name: (seen, policy.predict(shown)) for name, (seen, policy) in policies.items()}
    rows: list[dict[str, Any]] = []
    for keep in config.calibration.keep:
        chosen = {name: _chosen_at(*both, fit, test, keep) for name, both in predicted.items()}
        captured = captured_by(chosen, test.scores, test.budgets, frozenset(CONTROLS))
        rows += [
            {"keep": keep, "policy": name, **outcome(choice, test), **asdict(captured[name])}
            for name, choice in chosen.items()
        ]
    known = {name: np.concatenate(both) for name, both in predicted.items() if name in (best, *BLIND)}
    pooled = pooled_gain(known.pop(best), known, workspace.table(*IN_FULL), config.calibration.alpha)
    routed = None
    if "task" in controls:
        seen, learned = controls["task"]
        price, rule = priced_out_of_fold(seen, fit, config.calibration, allocator.certificate.keep)
        routed = rule.choose(replace(learned, outliers=allocator.outliers).predict(shown), price)
    return {"at_losses": rows, "pooled": pooled, "knows_the_prompt": knows_the_prompt(pooled["against"])}, routed


def _chosen_at(seen: Floats, predicted: Floats, known: Table, test: Table, keep: float) -> Choices:
    """Plans of the prompts of `test`, at the price whose mean loss on the prompts of `known` is at most 1 - `keep`."""
    price = price_for_loss(seen, known.losses, known.rule, alpha_of(keep) * known.unit)
    return test.rule.choose(predicted, price)


def outcome(chosen: Choices, test: Table) -> dict[str, float]:
    """Mean budget, mean loss, and the mean score in shares of the full model's."""
    rows = np.arange(len(chosen))
    return {
        "budget": float(test.budgets[chosen].mean()),
        "loss": float(test.losses[rows, chosen].mean()) / test.unit,
        "quality_ratio": float(test.scores[rows, chosen].mean() / max(test.full.mean(), 1e-12)),
    }


def _controls(
    best: Settings, fit: Table, tuning: TuningSection, left_out: Omissions
) -> dict[str, tuple[Floats, FittedPredictor]]:
    """Of each control that something can be learned from: what it expects out of fold, and what it learned."""
    found = {}
    with progress("controls", len(CONTROLS)) as advance:
        for name in CONTROLS:
            with left_out.guard(f"the control {name!r}"):
                features, sets = control_features(name, fit, best.sets)
                settings = control_settings(best, sets, tuning)
                learned = learn(settings, features, fit.losses, fit.budgets)
                found[name] = out_of_fold(settings, features, fit), learned
            advance(1)
    return found


def control_settings(best: Settings, sets: tuple[str, ...], tuning: TuningSection) -> Settings:
    """A control's settings: the defaults of the best controller's kind, for its own sets of features."""
    return default_settings(best.name, tuning.model_copy(update={"feature_sets": [list(sets)]}))


def control_features(name: str, table: Table, sets: tuple[str, ...]) -> tuple[Features, tuple[str, ...]]:
    """What a control learns from: features and the sets of them, where the controller reads `sets`."""
    if name == "shuffled":
        order = np.random.default_rng(0).permutation(len(table.prompts))
        return rows_of(table.features, order), sets
    return with_task(table, table.tasks), (name,)


def with_task(table: Table, known: Iterable[str]) -> Features:
    """The table's features and the set `task`: a column for each known task, sorted; other tasks are 0 in all."""
    names = np.array(sorted(set(known)))
    return {**table.features, "task": (table.tasks[:, None] == names).astype(np.float32)}


def pooled_gain(predicted: Floats, rivals: Mapping[str, Floats], table: Table, alpha: float) -> dict[str, Any]:
    """The gain of a controller over mixtures of static plans and over rivals at any price, at one mean loss.

    Args:
        predicted: what the controller expects of prompts that it did not see [N, K].
        rivals: name -> the same by another controller.
        table: the prompts.
        alpha: mean loss that the controller's price is picked for.
    """
    rows, chosen = np.arange(len(table.prompts)), priced_on_halves(predicted, table, alpha)
    curves = {"static_mixture": Curve(np.broadcast_to(table.budgets[:, None], table.scores.T.shape), table.scores.T)}
    for name, expected in rivals.items():
        plans = np.stack([table.rule.choose(expected, price) for price in (None, *PRICES[::STEP])])
        curves[name] = Curve(table.budgets[plans], table.scores[rows, plans])
    found = gains(table.budgets[chosen], table.scores[rows, chosen], table.full, curves)
    return {
        "prompts": len(rows),
        "alpha": alpha,
        "budget": float(table.budgets[chosen].mean()),
        "against": {name: asdict(gain) for name, gain in found.items()},
    }


def knows_the_prompt(against: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether a controller scores more, beyond noise, than each rival that does not look at the prompt."""
    blind = [against[name]["score_gained"]["low"] for name in BLIND if name in against]
    return "shuffled" in against and min(blind) > 0


def priced_on_halves(predicted: Floats, table: Table, alpha: float) -> Choices:
    """Plan of each prompt [N] at the price whose mean loss on the other half of the prompts is at most `alpha`."""
    halves = np.array_split(np.random.default_rng(0).permutation(len(table.prompts)), 2)
    chosen = np.zeros(len(table.prompts), dtype=np.intp)
    for seen, unseen in (halves, halves[::-1]):
        half = table.rows(seen)
        price = price_for_loss(predicted[seen], half.losses, half.rule, alpha * half.unit)
        chosen[unseen] = table.rule.choose(predicted[unseen], price)
    return chosen
