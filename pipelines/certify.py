"""A new certificate for a saved allocator, from later prompts of its user. Nothing is trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np
from filelock import Timeout
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from backbone.errors import InputError
from backbone.files import lock_of
from backbone.loading import load_backbone
from controller.base import Floats
from controller.certificate.calibration import PRICES, on_path
from controller.certificate.certificate import Certificate
from controller.features import Features, prompt_features
from oracle.chat import padded_prompts, tokens_of
from oracle.decoding import Decoding
from oracle.judges import KL
from oracle.labels.labeller import Labeller
from oracle.labels.reader import judged
from oracle.labels.store import LabelStore
from oracle.prompts import Prompt, check_lengths, load_prompts
from pipelines.evaluation.learning_table import Table
from pipelines.later_prompts import OTHERS, check_enough, check_unused, levels_of, note_used
from pipelines.run.check import try_judge
from pipelines.run.progress import progress
from pipelines.run.workspace import by_plan
from pipelines.stages.calibrate import certified, certified_plan, drift_alarm, prompts_hash
from pipelines.stages.label import fill
from runtime.allocator import Allocator
from runtime.parts import OperatingPoint
from runtime.saving.allocator_checks import optional_parts
from runtime.saving.allocator_files import run_folder

SAFER = 2.0
"""Times the old price at which the test of a bound of 1 or more begins. At the old price itself, the lowest that the
old prompts allowed, half of all tests with as many prompts would fail."""
LABELS, USED, RUN_CONFIG = "labels.db", "used.json", "config.yaml"


@dataclass(frozen=True)
class Certified:
    """What came of it.

    Attributes:
        before: certificate of each level before; levels that were not certified are missing.
        after: certificate of each level on the new prompts.
        folder: where the allocator was saved; None where no level is certified, and nothing was saved.
    """

    before: dict[float, Certificate]
    after: dict[float, Certificate]
    folder: Path | None


def certify_file(
    source: str,
    prompts: Path,
    *,
    out: Path | None = None,
    model: str | None = None,
    judge: str | None = None,
    split: str = "train",
    chat_template: Path | None = None,
    batch_size: int = 32,
    device: str = "auto",
) -> Certified:
    """Certify a saved allocator on the prompts of a file, and save it with what was found.

    Bounds, confidence, risk, menu and decoding stay those of the old certificate, which is kept as
    `certificate-DATE.json`. Labels lie in `<folder>-certify/`, from where a stopped call goes on.

    Args:
        source: folder or hub repository of the allocator.
        prompts: see `oracle.prompts.load_prompts`.
        out: where to save; None for the allocator's own folder.
        model: where to load the model from; None for the allocator's `model_source`.
        judge: of prompts that name none.
        split: of a data set or task that `prompts` names.
        chat_template: see `Allocator.from_pretrained`.
        batch_size: prompts answered together.
        device: see `load_backbone`.

    Raises:
        InputError: prompts that were used before, or too few; no folder to save to; another process is at work there.
        PromptError: see `load_prompts`.
        WrongModelError: another model than the allocator's.
    """
    allocator = Allocator.from_pretrained(source, chat_template=chat_template)
    folder = _place(source, out)
    given = load_prompts(str(prompts), judge=judge, dataset_split=split)
    for name in sorted({prompt.judge for prompt in given} - {KL}):
        try_judge(name, [prompt for prompt in given if prompt.judge == name])
    check_enough(allocator.certificate, given)
    beside = folder.with_name(f"{folder.name}-certify")
    with _alone(beside):
        check_unused(given, beside / USED, run_folder(source) / RUN_CONFIG)
        loaded = load_backbone(allocator.model_source if model is None else model, device=device)
        healing = allocator.prepare(loaded[0])
        shown = _rendered(allocator, *loaded, given)
        if prompts_hash(shown) == allocator.certificate.prompts_hash:
            raise InputError(f"{prompts} holds the prompts of the allocator's own certificate; {OTHERS}")
        beside.mkdir(parents=True, exist_ok=True)
        labeller = Labeller(*loaded, allocator.decoding, LabelStore(beside / LABELS), batch_size, healing)
        features = _features(allocator, *loaded, shown, batch_size)
        table, predicted = _labelled(allocator, labeller, shown, features)
        after = _tested(allocator, table, predicted, labeller.decoding)
        valid = any(found.price is not None for found in after.values())
        if valid:
            _save_old(allocator, folder)
            _with_certificates(allocator, table, predicted, after, labeller.decoding).save_pretrained(folder)
        note_used(beside / USED, given)
    return Certified(_certificates(allocator), after, folder if valid else None)


def _place(source: str, out: Path | None) -> Path:
    if out is not None:
        if (folder := out.expanduser().absolute()).exists() and not folder.is_dir():
            raise InputError(f"--out {out} is a file; name a folder")
        return folder
    if not (folder := Path(source).expanduser()).is_dir():
        raise InputError(f"the allocator {source} is no folder of this machine; name one to save to by --out DIR")
    return folder.absolute()


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    lock = lock_of(folder)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise InputError(f"another process certifies in {folder}; wait for it") from None
    try:
        yield
    finally:
        lock.release()


def _rendered(
    allocator: Allocator, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt]
) -> list[Prompt]:
    """The prompts as the model is given them. Raises PromptError for one that cannot be rendered, or is too long."""
    template = None if allocator.chat is None else allocator.chat.template(tokenizer)
    found = [prompt.rendered(template) for prompt in prompts]
    check_lengths(model, tokenizer, [(one.id, one.prompt) for one in found], allocator.decoding.max_new_tokens)
    return found


def _features(
    allocator: Allocator,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    batch_size: int,
) -> Features:
    """What the controller reads of the prompts, in batches of like length, longest first."""
    depth, sets = allocator.menu.probe_depth, allocator.projection.sets
    order = np.argsort([-len(tokens_of(tokenizer, prompt.prompt)) for prompt in prompts], kind="stable")
    found: list[Features] = []
    with progress("prompts", len(prompts)) as advance:
        for rows in np.array_split(order, range(batch_size, len(order), batch_size)):
            batch = padded_prompts(tokenizer, [prompts[row].prompt for row in rows]).to(model.device)
            found.append(prompt_features(model, batch["input_ids"], batch["attention_mask"], depth, sets))
            advance(len(rows))
    back = order.argsort()
    return {name: np.concatenate([part[name] for part in found])[back] for name in sets}


def _labelled(
    allocator: Allocator, labeller: Labeller, prompts: list[Prompt], features: Features
) -> tuple[Table, Floats]:
    """Label what some price chooses. Returns the N prompts that count, and what plans are expected to lose [N, K]."""
    old, plans, rule = allocator.certificate, allocator.menu.plans, allocator.rule
    predicted = allocator.selector().predictor.predict(features)
    cells = on_path(predicted, rule)
    cells[:, [found.plan for found in _certificates(allocator).values() if found.plan is not None]] = True
    wanted = by_plan(prompts, plans, cells)
    fill(labeller, wanted, "labels")
    scores = np.zeros(cells.shape)
    for own, column, (plan, some) in zip(cells.T, scores.T, wanted.items(), strict=True):
        column[own] = labeller.scores(some, plan)
    table = Table.of(prompts, scores, features, rule.budgets, old.risk, old.tolerance, cells)
    if len(table.prompts) < 2:
        raise InputError(f"the judges failed on the full model's answers to all but {len(table.prompts)} prompts")
    return table, predicted[judged(scores)[0]]


def _tested(allocator: Allocator, table: Table, predicted: Floats, decoding: Decoding) -> dict[float, Certificate]:
    """Certify each level of the old certificate."""
    old, before = allocator.certificate, _certificates(allocator)
    terms = {
        "levels": levels_of(old),
        "delta": old.delta,
        "risk": old.risk,
        "per_task": bool(old.per_task),
        "tolerance": old.tolerance,
        "decoding": str(decoding),
    }

    def of(keep: float) -> Certificate:
        if (known := before.get(keep)) is not None and known.plan is not None:
            return certified_plan(known.plan, table, keep=keep, **terms)
        return certified(predicted, table, keep=keep, start=_start(keep, known), **terms)

    return {keep: of(keep) for keep in levels_of(old)}


def _start(keep: float, before: Certificate | None) -> int:
    """The place of the price that is tested first: the dearest, or for a bound of 1 or more one above the old price,
    which other prompts have chosen."""
    if keep < 1 or before is None or before.price is None:
        return 0
    return int(np.searchsorted(-PRICES, -SAFER * before.price))


def _certificates(allocator: Allocator) -> dict[float, Certificate]:
    """By their levels, that which is served first."""
    return {one.keep: one for one in (allocator.certificate, *(point.certificate for point in allocator.others))}


def _with_certificates(
    allocator: Allocator, table: Table, predicted: Floats, after: dict[float, Certificate], decoding: Decoding
) -> Allocator:
    """The allocator at its own level, or at the highest that is certified now, with new alarms for all of these."""
    valid = sorted((found for found in after.values() if found.price is not None), key=lambda found: -found.keep)
    own = next((found for found in valid if found.keep == allocator.certificate.keep), valid[0])
    alarms = [alarm for alarm in (allocator.drift, *(point.drift for point in allocator.others)) if alarm is not None]
    rate = alarms[0].false_alarm_rate if alarms else None
    alarm_at = partial(drift_alarm, allocator.projection(table.features), predicted, table.rule)
    points = [OperatingPoint(found, None if rate is None else alarm_at(found, rate)) for found in valid]
    new = replace(
        allocator,
        certificate=own,
        drift=points[valid.index(own)].drift,
        others=tuple(point for point in points if point.certificate is not own),
        decoding=decoding,
    )
    return new.assuming(optional_parts(new))


def _save_old(allocator: Allocator, folder: Path) -> None:
    """The old certificates as files with their dates, beside what lies in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for found in _certificates(allocator).values():
        level = "" if found is allocator.certificate else f"-keep-{found.keep:g}"
        names = (f"certificate-{found.date}{level}{f'-{n}' if n > 1 else ''}.json" for n in count(1))
        path = next(path for path in map(folder.joinpath, names) if not path.exists() or _is(path, found))
        found.save(path)


def _is(path: Path, certificate: Certificate) -> bool:
    return Certificate.load(path) == certificate
