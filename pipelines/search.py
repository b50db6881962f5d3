"""The least sufficient plan of single prompts, found on the frozen model: what `layerbudget search` reports.

Dr.LLM (Heakl et al. 2025, arXiv 2510.12773) and CoLa (Li et al. 2025, arXiv 2507.07996) report such plans. They are
picked by the prompt's own score, so luck is among their reasons: a controller cannot be expected to find them all.
"""

from __future__ import annotations

import csv
import io
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

import numpy as np

from backbone.families import sublayer_bytes
from backbone.files import write_atomically
from oracle.prompts import Prompt
from oracle.search import SEARCHERS
from oracle.search.base import SearchSpace
from oracle.search.driver import search_prompts
from pipelines.run.progress import progress, say_failures
from pipelines.run.state import check_own
from pipelines.run.workspace import Workspace


@dataclass(frozen=True, slots=True)
class LeastPlan:
    """One row of the table.

    Attributes:
        full_score: of the full model's answer.
        plan: the least that was found sufficient; the full one where no other is known to be.
        budget: share of the decoder's parameter bytes that it runs.
        layers: that it runs, half-layers counted as halves.
        proved: that no cheaper plan of the menu is sufficient; only searchers over the menu can prove it.
        evaluations: plans that were tried.
    """

    id: str
    task: str
    full_score: float
    plan: str
    budget: float
    layers: float
    proved: bool
    evaluations: int


def find_least_plans(workspace: Workspace, name: str, evaluations: int, prompts: Sequence[Prompt]) -> list[LeastPlan]:
    """Search for each of N prompts; labels stay in the run's store, so that a search is resumable.

    Args:
        workspace: of a run that has its menu.
        name: of the searcher.
        evaluations: plans that are tried for a prompt, at most.
        prompts: with references and judges.

    Raises:
        SearchError: a space that the searcher cannot search.
    """
    labeller, sizes = workspace.labeller(None), sublayer_bytes(workspace.model.loaded[0])
    space, tolerance = SearchSpace(workspace.frozen_menu(), sizes), workspace.config.label.tolerance
    with progress("plans tried", evaluations * len(prompts)) as advance:
        found = search_prompts(SEARCHERS[name], space, labeller, prompts, evaluations, tolerance, advance)
    say_failures(labeller.failures)
    scores = labeller.scores(prompts, space.full)
    return [
        LeastPlan(
            id=prompt.id,
            task=prompt.task,
            full_score=score,
            plan=str(one.plan),
            budget=space.budget(one.plan),
            layers=float(one.plan.layers),
            proved=one.proved,
            evaluations=one.evaluations,
        )
        for prompt, score, one in zip(prompts, scores, found, strict=True)
    ]


def own_search_folder(workspace: Workspace) -> Path:
    """Where tables and figures go. Raises ConfigError where somebody's own file lies there."""
    folder = workspace.path("search")
    check_own(folder, lambda file: file.stem in SEARCHERS and file.suffix in (".csv", ".svg"))
    return folder


def write_least_plans(folder: Path, name: str, rows: Sequence[LeastPlan]) -> tuple[Path, Path]:
    """A table and a figure."""
    from pipelines.evaluation.figures import least_budgets

    folder.mkdir(exist_ok=True)
    text = io.StringIO()
    table = csv.writer(text)
    table.writerow([field.name for field in fields(LeastPlan)])
    table.writerows(astuple(row) for row in rows)
    write_atomically(folder / f"{name}.csv", text.getvalue())
    write_atomically(folder / f"{name}.svg", least_budgets([row.budget for row in rows]))
    return folder / f"{name}.csv", folder / f"{name}.svg"


def described(rows: Sequence[LeastPlan]) -> Iterator[str]:
    """A line for each kind of prompt, and one for all."""
    by_task: dict[str, list[LeastPlan]] = defaultdict(list)
    for row in rows:
        by_task[row.task].append(row)
    for name, some in [*(sorted(by_task.items()) if len(by_task) > 1 else ()), ("all", rows)]:
        budget, layers = np.mean([row.budget for row in some]), np.mean([row.layers for row in some])
        full, proved = sum(row.budget == 1 for row in some), sum(row.proved for row in some)
        yield (
            f"{name:<12} {len(some):>4} prompts: {budget:.0%} of the decoder, {layers:.1f} layers; "
            f"{full} in full, {proved} proved"
        )
