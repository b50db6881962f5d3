"""Stage 9: one self-contained HTML page, and the run in MLflow."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import date
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from backbone.files import write_atomically
from oracle.batches import spread
from oracle.frontier.frontier import static_points
from pipelines.evaluation import figures, summary
from pipelines.evaluation.bands import frontier_bands, price_band
from pipelines.evaluation.examples import RULE
from pipelines.evaluation.report_rows import (
    Measured,
    Row,
    compared,
    contestant_rows,
    dots,
    plan_rows,
    task_rows,
    timed_alone,
    timed_in_batches,
)
from pipelines.evaluation.svg import colour_of, themed, title_of
from pipelines.run.progress import Omissions, waiting
from pipelines.run.state import RunState
from pipelines.run.tracking import log_run
from pipelines.run.workspace import Workspace
from pipelines.stages.train import load_trained
from pipelines.verdict import FullRun, verdict
from runtime.allocator import Allocator

MOST_DOTS = 400
"""Prompts that are drawn one by one."""


def run(workspace: Workspace, full: FullRun | None = None) -> Path:
    """Writes `report.html`, then logs the run to `tracking.uri`.

    `full` is for a trial; see `pipelines.verdict.verdict`.
    """
    config, tuning, left_out = workspace.config, workspace.read("tuning.json"), Omissions()
    measured = Measured.of(workspace)
    metrics, tasks = measured.metrics, task_rows(measured)
    drawn = _figures(workspace, measured, tasks, left_out)
    environment = Environment(loader=PackageLoader(__package__, "."), autoescape=True, undefined=StrictUndefined)
    page = environment.get_template("report.html.j2").render(
        config=config,
        metrics=metrics,
        headline=summary.headline(metrics),
        verdict=verdict(metrics, full),
        tiles=summary.tiles(metrics),
        rival=summary.rival(metrics),
        exceeds_limit=summary.exceeds_limit(metrics),
        figures={name: themed(text) for name, text in drawn.items()},
        left_out={**metrics["left_out"], **left_out},
        title_of=title_of,
        colour_of=colour_of,
        policies=measured.policies,
        spots=measured.spots,
        contestants=contestant_rows(metrics, measured.spots),
        saved=summary.saved,
        tail=summary.tail,
        dots=min(MOST_DOTS, len(measured.table.prompts)),
        plans=plan_rows(measured),
        rule=RULE,
        tasks=tasks,
        tuning=tuning,
        compared=compared(metrics["comparison"]),
        searched=metrics["prompts"]["train"] + metrics["prompts"]["tune"] >= config.tuning.search_from,
        seconds=RunState(workspace).seconds(),
        today=date.today().isoformat(),
    )
    write_atomically(workspace.path("report.html"), with_contents(with_labels(page)))
    with waiting(f"logging to {config.tracking.uri}"):
        log_run(config, metrics, drawn, config.folder)
    return workspace.path("report.html")


def _figures(workspace: Workspace, measured: Measured, tasks: list[Row], left_out: Omissions) -> dict[str, str]:
    """Name -> picture, of those that can be drawn; some also for a narrow screen."""
    menu, table, metrics = measured.menu, measured.table, measured.metrics
    outliers = Allocator.from_pretrained(workspace.path("allocator")).outliers
    trained, decided = load_trained(workspace), load_trained(workspace, outliers)

    def quality() -> dict[str, str]:
        scores, budgets = table.scores, table.budgets
        shown = (
            static_points(scores, budgets),
            frontier_bands(scores, budgets),
            {
                name: price_band(learned.predict(table.features), scores, table.rule)
                for name, learned in decided.items()
            },
            {name: measured.spots[name] for name in measured.policies},
        )
        return _both("quality", lambda narrow: figures.quality_against_budget(*shown, narrow=narrow))

    def prompts() -> dict[str, str]:
        shown = spread(dots(measured), MOST_DOTS)
        return _both("prompts", lambda narrow: figures.prompts_by_task(shown, menu.n_layers, narrow=narrow))

    def speed() -> dict[str, str]:
        batch = f"In a batch of {metrics['speed']['prompts']}"
        panels = {
            "single": (timed_alone(measured), "One prompt at a time"),
            "batch": (timed_in_batches(measured), batch),
        }
        return {
            f"speed_{how}": figures.speed_against_quality(timed, f"speed_{how}", title)
            for how, (timed, title) in panels.items()
        }

    def needs() -> dict[str, str]:
        layers = {row["task"]: (row["needed"], row["layers"]) for row in tasks}
        return {"tasks": figures.layers_by_task(layers, menu.n_layers, colour_of(metrics["best"]))}

    def reliability() -> dict[str, str]:
        predicted = {name: (learned.predict(table.features), table.losses) for name, learned in trained.items()}
        return {"reliability": figures.reliability(predicted)}

    draw = {"quality": quality, "prompts": prompts, "tasks": needs, "reliability": reliability}
    if metrics["speed"]["limit"]["low"] is not None:  # enough rounds to tell a gain from noise
        draw["speed"] = speed
    drawn: dict[str, str] = {}
    for name, make in draw.items():
        with left_out.guard(f"the picture {name!r}"):
            drawn |= make()
    return drawn


def _both(name: str, draw: Callable[[bool], str]) -> dict[str, str]:
    return {name: draw(False), f"{name}{figures.NARROW}": draw(True)}


_TABLE, _ROW, _HEADING = (re.compile(rf"<{name}\b.*?</{name}>", re.DOTALL) for name in ("table", "tr", "th"))
_ANCHOR, CONTENTS = re.compile(r'<h2 id="([^"]+)">(.*?)</h2>'), "<!-- contents -->"


def with_contents(page: str) -> str:
    """The page with a link to each heading that has an anchor, in the place of `CONTENTS`."""
    links = "\n".join(f'<li><a href="#{anchor}">{heading}</a></li>' for anchor, heading in _ANCHOR.findall(page))
    return page.replace(CONTENTS, f"<ol>\n{links}\n</ol>", 1)


def with_labels(page: str) -> str:
    """The page with the heading of its column on every cell of its tables: on a narrow screen, where a row's cells
    stand below each other, each shows it (`report.html.j2`)."""
    return _TABLE.sub(lambda table: _labelled(table[0]), page)


def _labelled(table: str) -> str:
    headings = [re.sub("<[^>]*>", "", heading) for heading in _HEADING.findall(table)]

    def row(found: re.Match[str]) -> str:
        names = iter(headings)
        return re.sub("<td(?=[ >])", lambda cell: f'<td data-label="{next(names)}"', found[0])

    return _ROW.sub(row, table)
