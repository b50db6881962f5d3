"""Tasks held out one at a time: how a controller decides about prompts of a task that it never saw, with the outlier
test and without it.

Shapes: `N` prompts, `K` plans.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from controller.base import choose
from controller.certificate.calibration import PricePath, valid_price
from controller.certificate.outliers import OutlierTest
from controller.feature_sets import WIDE
from controller.learning import Learned, Settings, learn
from oracle.prompts import Prompt
from pipelines.config import Config
from pipelines.learning_table import Table
from pipelines.measured_policies import Choices, chosen_at, measured, outcome
from pipelines.omissions import Omissions
from pipelines.pooled_gain import first_tested

TESTED, UNTESTED = "unseen_tasks", "unseen_untested"
"""Names of the policy with the outlier test and without it."""


def unseen_tasks(
    settings: Settings,
    fit: Table,
    held: NDArray[np.bool_],
    calibrate: Table,
    test: Table,
    config: Config,
    left_out: Omissions,
) -> dict[str, Any]:
    """Every prompt of `test` decided by a controller, at a price and by an outlier test, that never saw its task.

    Args:
        settings: of the controller.
        fit: prompts to learn from.
        held: which of them are held prompts of the outlier test [N]; the others are its references.
        calibrate: prompts to pick prices on.
        test: prompts that are decided about.
        config: `calibration` is read.
        left_out: names the tasks without which nothing can be learned.

    Returns:
        `at_losses`: rows for each of `calibration.keep`, at prices picked as for the other policies. `tasks`: for each
        task, at prices certified on the other tasks with the configuration's bound, what came of it with the outlier
        test and without, and the share of its prompts that was `sent` to the full plan. Both empty for a single task.
    """
    tasks, keeps = np.unique(test.tasks), config.calibration.keep
    full = len(test.budgets) - 1
    chosen = {(name, keep): np.full(len(test.prompts), full) for name in (TESTED, UNTESTED) for keep in keeps}
    rows = []
    for task in tasks if len(tasks) > 1 else ():
        known, others = np.flatnonzero(fit.tasks != task), np.flatnonzero(calibrate.tasks != task)
        if len(known) < 2 or not len(others):
            continue
        mine, rest = np.flatnonzero(test.tasks == task), calibrate.rows(others)
        with left_out.guard(f"the unseen task {str(task)!r}"):
            seen = fit.rows(known)
            learned = learn(settings, seen.features, seen.kept, fit.budgets)
            tested = replace(learned, outliers=outlier_test(learned, seen, held[known], config))
            (start,) = first_tested(settings, seen.features, seen, config.calibration.keep[:1])
            row, plans = _decided(tested, rest, test.rows(mine), config, start)
            rows.append({"task": str(task), **row})
            for key, found in plans.items():
                chosen[key][mine] = found
    if not rows:
        return {"at_losses": [], "tasks": []}
    policies = {keep: {name: chosen[name, keep] for name in (TESTED, UNTESTED)} for keep in keeps}
    return {"at_losses": [row for keep in keeps for row in measured(keep, policies[keep], test)], "tasks": rows}


def _decided(
    tested: Learned, rest: Table, unseen: Table, config: Config, start: int
) -> tuple[dict[str, Any], dict[tuple[str, float], Choices]]:
    """What comes of one task's prompts, and their plans at each of `calibration.keep`."""
    row: dict[str, Any] = {"n": len(unseen.prompts), "sent": 0.0}
    if tested.outliers is not None:
        row["sent"] = float(tested.outliers.are_outliers(unseen.features).mean())
    plans = {}
    for name, policy in ((TESTED, tested), (UNTESTED, replace(tested, outliers=None))):
        seen, predicted = policy.predict(rest.features), policy.predict(unseen.features)
        for keep in config.calibration.keep:
            plans[name, keep] = chosen_at(seen, predicted, rest, unseen, keep)
        row[name] = outcome(_certified(policy, rest, unseen, config, start), unseen)
    return row, plans


def are_among(prompts: Sequence[Prompt], table: Table) -> NDArray[np.bool_]:
    """Whether each prompt of a table [N] is one of these."""
    ids = {prompt.id for prompt in prompts}
    return np.array([prompt.id in ids for prompt in table.prompts])


def outlier_test(learned: Learned, fit: Table, held: NDArray[np.bool_], config: Config) -> OutlierTest | None:
    """The test that goes with a controller, of the wide features that it reads, or of all without such.

    None where `calibration.outliers` is 0 or there are no prompts on either side.

    Args:
        fit: the prompts that it learned from.
        held: those of them that the threshold is made from [N].
        config: the rate, `calibration.outliers`, is read.
    """
    rate = config.calibration.outliers
    if not rate or (~held).sum() < 2 or not held.any():
        return None
    known, others = fit.rows(np.flatnonzero(~held)).features, fit.rows(np.flatnonzero(held)).features
    read = learned.projection.sets
    return OutlierTest.fit(known, others, [name for name in read if name in WIDE] or read, rate)


def _certified(policy: Learned, calibrate: Table, test: Table, config: Config, start: int) -> Choices:
    settings, predicted = config.calibration, policy.predict(calibrate.features)
    price = valid_price(
        PricePath.of(predicted, calibrate.losses, calibrate.budgets),
        settings.alpha,
        settings.delta_of_one,
        risk=settings.risk,
        full=calibrate.full,
        groups=calibrate.groups,
        start=start,
    )
    return choose(policy.predict(test.features), test.budgets, price)
