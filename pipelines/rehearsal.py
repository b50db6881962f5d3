"""What pieces of a run cost on this machine, measured on a few of its prompts by the code that will do the work.

Nothing is written but into a temporary folder. Searches are stopped after a few seconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from backbone.left_padding import padded_inputs
from backbone.plan import PlanMenu
from backbone.stand_ins.attaching import detach
from backbone.stand_ins.fit_bridges import fit_bridges
from controller.features import Features
from oracle.chat import padded_prompts
from oracle.labels.labeller import Labeller
from oracle.menus import build_menu
from oracle.menus.base import MenuTask
from oracle.menus.search_steps import search_steps
from oracle.prompts import Prompt
from pipelines.config_sections import AdaptSection
from pipelines.learning_sections import EvaluationSection, TuningSection
from pipelines.paired_ratios import FEWEST_ROUNDS, generation_under
from pipelines.settings_regret import Work, default_settings

FEW = 8
"""Prompts that are answered and followed at first."""
MANY = 64
"""Prompts, at most, that are then answered and followed together."""
LABEL_SECONDS = 30.0
"""Time, by what the first prompts took, for those that follow."""
BYTES_OF_A_LABEL = 200.0
"""At least, in the store."""
SEARCH_PROMPTS, SEARCH_SECONDS = 4, 10.0
"""Prompts that a search for a menu looks at here, and the seconds after which it is stopped."""


class _EnoughError(Exception):
    """Stops a search that has been watched for long enough."""


@dataclass(frozen=True, slots=True)
class LabelCost:
    """Of one prompt.

    Attributes:
        full, shortened: seconds of the full model's answer, and of all shortened plans of the menu together.
        answer_tokens: of the full model's answer.
        stored_bytes: of a label on the disk.
    """

    full: float
    shortened: float
    answer_tokens: float
    stored_bytes: float


def timed(work: Callable[[], object]) -> float:
    """Seconds."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def menu_seconds(method: str, task: MenuTask) -> float:
    """The search for a menu, from its first seconds on `SEARCH_PROMPTS` prompts; the work grows with the prompts."""
    places = range(0, len(task.prompts), max(1, len(task.prompts) // SEARCH_PROMPTS))[:SEARCH_PROMPTS]
    labels = None if task.labels is None else task.labels.of_some(places)
    small = replace(task, prompts=[task.prompts[place] for place in places], labels=labels)
    steps: list[float] = []
    start = time.perf_counter()

    def advance() -> None:
        steps.append(time.perf_counter())
        if steps[-1] - start > SEARCH_SECONDS and len(steps) > 1:
            raise _EnoughError

    share = max(1.0, len(task.prompts) / max(1, len(small.prompts)))
    try:
        return share * timed(lambda: build_menu(method, small, advance))
    except _EnoughError:
        step = (steps[-1] - steps[0]) / (len(steps) - 1)
        return share * (steps[0] - start + step * (search_steps(method, task) - 1))


def label_cost(labeller: Labeller, prompts: Sequence[Prompt], menu: PlanMenu, path: Path) -> LabelCost:
    """Answers to and labels of a few prompts, by the labeller, after a warm-up.

    First of `FEW` prompts; if these are quick, of as many as run together, since larger batches cost less a prompt.

    Args:
        labeller: keeps its labels in the file `path`.
        prompts: a batch of them, none of them labelled there yet; the first is the warm-up.
        menu: the plans.
    """
    labeller.label(prompts[:1], menu)
    first, others = prompts[1 : FEW + 1], prompts[FEW + 1 :]
    cost = _label_cost(labeller, first, menu, path)
    affordable = int(LABEL_SECONDS / (cost.full + cost.shortened))
    if len(others) > FEW and affordable > FEW:
        cost = _label_cost(labeller, others[:affordable], menu, path)
    return cost


def _label_cost(labeller: Labeller, prompts: Sequence[Prompt], menu: PlanMenu, path: Path) -> LabelCost:
    before = path.stat().st_size
    full = timed(lambda: labeller.label_full(prompts, menu.plans[-1]))
    shortened = timed(lambda: labeller.label(prompts, menu))
    tokens = float(np.mean([len(row[-1].answer_ids) for row in labeller.read(prompts, menu)]))
    stored = max(BYTES_OF_A_LABEL, (path.stat().st_size - before) / (len(prompts) * len(menu)))
    return LabelCost(full / len(prompts), shortened / len(prompts), tokens, stored)


def bridge_seconds(
    model: PreTrainedModel, sequences: Sequence[Sequence[int]], menu: PlanMenu, settings: AdaptSection, count: int
) -> float:
    """The fit of the menu's bridges on so many sequences of a prompt with its answer.

    From two fits, of few sequences and of all given: the passes grow with the sequences, the solutions do not.

    Args:
        model, menu, settings: what is fitted, and how.
        sequences: some of them, to measure on.
        count: sequences of the run.
    """
    detach(model)
    form, rank, in_order = settings.form, settings.rank, settings.in_order
    fit = partial(fit_bridges, model, plans=menu.plans[:-1], form=form, rank=rank, in_order=in_order)
    part = sequences[: max(1, len(sequences) // 4)]
    fit(part)  # the warm-up
    few, many = timed(lambda: fit(part)), timed(lambda: fit(sequences))
    slope = max(0.0, many - few) / max(1, len(sequences) - len(part))
    return many + slope * (count - len(sequences))


def training_seconds(
    model: PreTrainedModel, sequences: Sequence[Sequence[int]], menu: PlanMenu, settings: AdaptSection
) -> float:
    """The training of an adapter, for one sequence and one epoch: the teacher's pass, and for each plan of a step a
    pass and its way back, which is taken for twice as long. No training is tried."""
    ids = [list(sequence) for sequence in sequences]

    def a_pass() -> None:
        with torch.inference_mode():
            model(**padded_inputs(model, ids), use_cache=False)

    budget = sum(menu.budgets[:-1]) / max(1, len(menu.budgets) - 1)
    return timed(a_pass) / len(ids) * (1 + 3 * budget * settings.plans_per_step)


def timing_seconds(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], menu: PlanMenu,
    settings: EvaluationSection,
) -> float:  # fmt: skip
    """The timings of the stage `evaluate`, from one batch and one prompt by itself under the full plan, once warmed up.

    A round generates for the batch under every plan, by stock and by the allocator, and by these two for each prompt.
    """
    one, batch = (dict(padded_prompts(tokenizer, some).to(model.device)) for some in (texts[:1], texts))
    runs = [generation_under(model, inputs, menu.plans[-1], settings.speed_tokens) for inputs in (one, batch)]
    timed(runs[0])
    single, whole = map(timed, runs)
    a_round = (sum(menu.budgets) + 2) * whole + 2 * len(texts) * single
    rounds = min(settings.speed_rounds, max(FEWEST_ROUNDS, settings.speed_seconds / a_round))
    return (1 + rounds) * a_round


def trial_seconds(work: Work, name: str) -> float:
    """One trial of a controller's search, with its default settings."""
    return timed(lambda: work.judge(default_settings(name, work.tuning)))


def made_up_work(features: Features, rows: int, menu: PlanMenu, tuning: TuningSection) -> Work:
    """A table for `trial_seconds` of as many rows as the run's will have: features of a few prompts with noise, and
    shares of quality that fall with the budget, sooner or later by the first of the features."""
    draw = np.random.default_rng(0)
    picked = draw.integers(len(next(iter(features.values()))), size=rows)
    grown = {
        name: (values[picked] + 0.1 * draw.standard_normal((rows, values.shape[1]))).astype(np.float32)
        for name, values in features.items()
    }
    ranked = next(iter(grown.values()))[:, 0].argsort().argsort() / max(1, rows - 1)
    budgets = np.array(menu.budgets)
    kept = (ranked[:, None] < budgets[None]).astype(np.float64)
    kept[:, -1] = 1.0
    return Work(grown, kept, budgets, (0.05, 0.1, 0.15), tuning)
