"""Stage 7: the labels that the best controller's prices ask for, its certified price, and its allocator."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from controller.base import WIDE, ChoiceRule, FittedPredictor, Floats
from controller.certificate.calibration import (
    PricePath,
    certify,
    cheapest_valid_plan,
    first_price,
    on_path,
    valid_price,
)
from controller.certificate.certificate import PLAN_SHARE, Certificate, alpha_of
from controller.certificate.drift import DriftAlarm, drift_scores
from controller.certificate.outliers import OutlierTest
from oracle.labels.reader import acceptance_rates
from oracle.prompts import Prompt
from pipelines.config import Config
from pipelines.config.learning_sections import CalibrationSection
from pipelines.evaluation.learning_table import Table
from pipelines.ray.distributed import Workers
from pipelines.run.progress import say
from pipelines.run.prompts import IN_FULL
from pipelines.run.workspace import Workspace
from pipelines.stages.label import label_cells
from pipelines.stages.train import load_out_of_fold, load_trained
from runtime.allocator import Allocator
from runtime.chat_format import ChatFormat
from runtime.parts import OperatingPoint
from runtime.saving.allocator_checks import optional_parts


def run(workspace: Workspace, workers: Workers | None = None) -> Path:
    """Write `calibration.json` with the best controller's certificates, and save that controller as `allocator/`.

    Which controller is best was decided on the other prompts, so the calibrate split has seen no choice but the prices.
    The allocator runs at the first value of `calibration.keep`, or at the highest that is certified where the first is
    not.
    """
    config, best = workspace.config, workspace.read("tuning.json")["best"]
    calibration, keep = config.calibration, config.calibration.keep
    learned, fit = load_trained(workspace)[best], workspace.table("train", "tune")
    tuned = {prompt.id for prompt in workspace.prompts.splits["tune"]}
    held = np.array([prompt.id in tuned for prompt in fit.prompts])
    learned = replace(learned, outliers=outlier_test(learned, fit, held, config))
    table = _labelled_table(workspace, learned, workers)
    predicted = learned.predict(table.features)
    terms = {
        "levels": tuple(keep),
        "delta": calibration.delta,
        "risk": calibration.risk,
        "per_task": calibration.per_task,
        "tolerance": config.label.tolerance,
        "decoding": str(workspace.model.decoding),
    }
    every = []
    for level, start in zip(keep, first_tested(load_out_of_fold(workspace)[best], fit, keep), strict=True):
        found = certified(predicted, table, keep=level, start=start, share=1 - PLAN_SHARE, **terms)
        rule = rule_at(table.rule, predicted, found.price, plan_for_all(fit, calibration, level))
        if rule.plan is not None:
            found = certified_plan(rule.plan, fit, keep=level, share=PLAN_SHARE, **terms)
        every.append(found)
    for certificate in every:
        if certificate.price is None:
            say(f"  {certificate.sentence}", style="red")
    valid = sorted((found for found in every if found.price is not None), key=lambda found: -found.keep)
    chosen = every[0] if every[0].price is not None or not valid else valid[0]
    alarm_at = partial(drift_alarm, learned.projection(table.features), predicted, table.rule)
    others = [found for found in valid if found is not chosen]
    allocator = _allocator(workspace, best, learned, alarm_at, chosen, others)
    allocator.save_pretrained(workspace.path("allocator"))
    certificates = [{**asdict(found), "sentence": found.sentence} for found in (allocator.certificate, *every)]
    data = {"best": best, "certificate": certificates[0], "certificates": certificates[1:]}
    workspace.write("calibration.json", data)
    return workspace.path("allocator")


def _allocator(
    workspace: Workspace,
    best: str,
    learned: FittedPredictor,
    alarm_at: Callable[[Certificate, float], DriftAlarm],
    certificate: Certificate,
    others: Sequence[Certificate],
) -> Allocator:
    """The best controller with its certificate and the other valid ones, each with a drift alarm."""
    menu, labelled = workspace.menu(), workspace.prompts.labelled(*IN_FULL)
    rate = workspace.config.calibration.false_alarms
    alarms = {found.keep: alarm_at(found, rate) for found in (certificate, *others)}
    allocator = Allocator(
        menu=menu,
        controller=learned.controller,
        controller_name=best,
        projection=learned.projection,
        certificate=certificate,
        decoding=workspace.model.decoding,
        fingerprint=workspace.model.facts.fingerprint,
        model_source=workspace.config.model.source,
        healing=None if workspace.healing.is_empty else workspace.healing,
        acceptance=acceptance_rates(workspace.labels.read(labelled, menu)),
        drift=alarms[certificate.keep],
        others=tuple(OperatingPoint(found, alarms[found.keep]) for found in others),
        outliers=learned.outliers,
        chat=_chat_format(workspace),
    )
    return allocator.assuming(optional_parts(allocator))


def first_tested(seen: Floats, fit: Table, keep: Sequence[float]) -> list[int]:
    """For each value of `keep` the place of the price that is tested first, from predictions out of fold [N, K]."""
    if max(keep) < 1:
        return [0 for _ in keep]
    path = PricePath.of(seen, fit.losses, fit.rule)
    return [first_price(path, alpha_of(level), fit.full) for level in keep]


def _labelled_table(workspace: Workspace, learned: FittedPredictor, workers: Workers | None) -> Table:
    """The calibrate prompts, labelled in full and under the plans that some price chooses for them."""
    rule = ChoiceRule(np.array(workspace.menu().budgets), workspace.config.calibration.risk)
    cells = on_path(learned.predict(workspace.features("calibrate")), rule)
    label_cells(workspace, "calibrate", cells, workers)
    return workspace.table("calibrate", wanted=cells)


def outlier_test(learned: FittedPredictor, fit: Table, held: NDArray[np.bool_], config: Config) -> OutlierTest | None:
    """The test that goes with a controller, of the wide features that it reads, or of all without such.

    It is fitted on the prompts of `fit`; `held` [N] marks those that the threshold is made from. None where
    `calibration.outliers` is 0 or there are no prompts on either side.
    """
    rate, read = config.calibration.outliers, learned.projection.sets
    if not rate or (~held).sum() < 2 or not held.any():
        return None
    known, others = fit.rows(np.flatnonzero(~held)).features, fit.rows(np.flatnonzero(held)).features
    return OutlierTest.fit(known, others, [name for name in read if name in WIDE] or read, rate)


def certified(predicted: Floats, table: Table, *, keep: float, **terms: Any) -> Certificate:
    """The certificate at one level, by Learn-then-Test on the prompts of a table.

    Args:
        predicted: expected losses [N, K].
        table: the N calibration prompts with their labels.
        keep, terms: what `certify` takes beside the table's.
    """
    return _certify(PricePath.of(predicted, table.losses, table.rule, table.labelled), table, keep=keep, **terms)


def certified_plan(plan: int, table: Table, *, keep: float, **terms: Any) -> Certificate:
    """The certificate of one plan for all prompts, as `certified`; its `plan` is None where it is not valid."""
    path = PricePath(table.losses[:, [plan]].T, np.ones(1, dtype=np.bool_))
    found = _certify(path, table, keep=keep, **terms)
    return found if found.price is None else replace(found, plan=plan)


def _certify(path: PricePath, table: Table, **terms: Any) -> Certificate:
    return certify(
        path,
        full=table.full,
        tasks=table.tasks,
        groups=table.groups,
        left_out=table.left_out,
        prompts_hash=prompts_hash(table.prompts),
        chat_template=max(prompt.template for prompt in table.prompts),  # those given as they are have an empty one
        **terms,
    )


def prompts_hash(prompts: Sequence[Prompt]) -> str:
    return hashlib.sha256("".join(prompt.hash for prompt in prompts).encode()).hexdigest()[:16]


def plan_for_all(fit: Table, calibration: CalibrationSection, keep: float) -> int:
    """The cheapest plan that is valid for all prompts, or the full one, tested on what a controller learned from.

    A controller that learned from few prompts may win less than one plan. Plans have learned nothing from these
    prompts, and no price is tested on them. They are tested from the deepest to the first that fails.
    """
    return cheapest_valid_plan(
        fit.losses,
        alpha_of(keep),
        PLAN_SHARE * calibration.delta / len(calibration.keep),
        calibration.risk,
        expected=-np.arange(float(len(fit.budgets))),
        tasks=fit.tasks if calibration.per_task else None,
        full=fit.full,
        groups=fit.groups,
    )


def rule_at(rule: ChoiceRule, expected: Floats, price: float | None, plan: int) -> ChoiceRule:
    """The rule, or one that gives all prompts the plan where no valid price runs less; losses are expected [N, K]."""
    runs = np.inf if price is None else rule.budgets[rule.choose(expected, price)].mean()
    return replace(rule, plan=plan if plan < len(rule.budgets) - 1 and rule.budgets[plan] < runs else None)


def priced_out_of_fold(
    seen: Floats, fit: Table, calibration: CalibrationSection, keep: float
) -> tuple[float | None, ChoiceRule]:
    """The price that is tested for a policy on the prompts that it learned from, and the rule to choose by there.

    It stands for what a certificate would allow where the calibrate split is labelled for another policy, which expects
    losses out of fold [N, K]. The sequence begins where it would on these very prompts, so that it certifies nothing.
    """
    path = PricePath.of(seen, fit.losses, fit.rule)
    price = valid_price(
        path,
        alpha_of(keep),
        calibration.delta_of_one,
        fit.tasks if calibration.per_task else None,
        risk=calibration.risk,
        full=fit.full,
        groups=fit.groups,
        start=first_price(path, alpha_of(keep), fit.full),
    )
    return price, rule_at(fit.rule, seen, price, plan_for_all(fit, calibration, keep))


def drift_alarm(
    projected: Floats, predicted: Floats, rule: ChoiceRule, found: Certificate, false_alarm_rate: float
) -> DriftAlarm:
    """The alarm of a certificate, by the N prompts to calibrate on.

    Args:
        projected: what the controller sees of them [N, F].
        predicted: what plans are expected to lose [N, K].
        rule: how plans are chosen at a price.
        found: the certificate.
        false_alarm_rate: see `DriftAlarm`.
    """
    chosen = replace(rule, plan=found.plan).choose(predicted, found.price)
    return DriftAlarm(drift_scores(projected, rule.budgets[chosen]), false_alarm_rate)


def _chat_format(workspace: Workspace) -> ChatFormat | None:
    """None where every prompt was given as it is, so that those to come are too."""
    is_rendered = [bool(prompt.template) for prompt in workspace.prompts.labelled()]
    if (template := workspace.prompts.template) is None or not any(is_rendered):
        return None
    return ChatFormat.of(template, workspace.model.tokenizer, for_all=all(is_rendered))
