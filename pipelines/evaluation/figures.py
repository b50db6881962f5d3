"""The report's figures, as SVG text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import mean
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from controller.report.headroom import Estimate
from oracle.frontier.frontier import Point
from pipelines.evaluation.bands import Band, Spot
from pipelines.evaluation.svg import GRID, HALF, INK, MUTED, STYLE, WIDE, colour_of, drawing, title_of, to_svg

NARROW = "_narrow"
"""Ends the name of a figure for a narrow screen."""
BELOW: Any = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.14), "ncols": 2}
"""Place of a legend that has no room in its figure."""
FRONTIERS = {
    "oracle": ("oracle", "-", "oracle frontier (flattered)"),
    "corrected": ("oracle", ":", "oracle frontier, corrected for luck"),
    "mixture": ("static_mixture", "--", "mixtures of static plans"),
}
"""Curves of `pipelines.evaluation.bands.frontier_bands`: whose colour they have, their line, what they are called."""


@matplotlib.rc_context(STYLE)
def quality_against_budget(
    statics: Sequence[Point],
    frontiers: Mapping[str, Band],
    curves: Mapping[str, Band],
    spots: Mapping[str, Spot],
    narrow: bool = False,
) -> str:
    """Mean score against mean budget, with intervals: static plans, frontiers, each controller at all prices, and each
    policy where it was set to work."""
    figure, axes = drawing(HALF, 4.6) if narrow else drawing(WIDE, 5.6)
    for name, band in frontiers.items():
        policy, line, label = FRONTIERS[name]
        _draw_band(axes, band, colour_of(policy), label, ls=line)
    for name, band in curves.items():
        _draw_band(axes, band, colour_of(name), f"{title_of(name)}, all prices", ls="-")
    axes.scatter(*_columns(statics), color=colour_of("static_mixture"), s=22, label="static plans", zorder=3)
    axes.axhline(spots["full"].quality.value or 0.0, color=MUTED, lw=0.8, ls=":")
    hovers = {}
    for place, (name, own) in enumerate(spots.items()):
        hovers[f"policy-{place}"] = [
            f"{title_of(name)}\nmean score {_said(own.quality, '.3f')}\nof the decoder {_said(own.budget, '.1%')}"
        ]
        _draw_spot(axes, own.budget, own.quality, colour_of(name), gid=f"policy-{place}")
    axes.set(xlabel="mean budget (share of the decoder that runs)", ylabel="mean score")
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:.0%}")
    axes.legend(fontsize=9, **(BELOW if narrow else {"loc": "lower right"}))
    title = "Mean score against the mean share of the decoder that runs"
    return to_svg(figure, f"quality{NARROW * narrow}", title, hovers)


@dataclass(frozen=True, slots=True)
class Contestant:
    """Requests a second, as a multiple of stock generation, and the share of the full model's mean score kept.

    `kind` stands in the legend, once for all of a kind.
    """

    name: str
    kind: str
    colour: str
    kept: Estimate
    speed: Estimate


@matplotlib.rc_context(STYLE)
def speed_against_quality(contestants: Sequence[Contestant], name: str, title: str) -> str:
    """Speed against score kept, both with their intervals; names stand under the pointer."""
    figure, axes = drawing(HALF, 4.4)
    axes.axhline(1, color=MUTED, lw=0.8, ls=":")
    axes.axvline(1, color=MUTED, lw=0.8, ls=":")
    hovers, labelled = {}, set[str]()
    for place, each in enumerate(contestants):
        hovers[f"{name}-{place}"] = [
            f"{each.name}\n{_said(each.speed, '.2f')} times stock\n{_said(each.kept, '.1%')} of the score kept"
        ]
        _draw_spot(
            axes, each.kept, each.speed, each.colour, f"{name}-{place}", None if each.kind in labelled else each.kind
        )
        labelled.add(each.kind)
    axes.set(xlabel="share of the full model's mean score kept", ylabel="requests a second, times stock", title=title)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:.0%}")
    axes.legend(fontsize=9, **BELOW)
    return to_svg(figure, name, f"{title}: requests a second against the share of the score kept", hovers)


@dataclass(frozen=True, slots=True)
class Dot:
    """A prompt: its kind, the layers that it ran, its score less the full model's, and what is said of it."""

    task: str
    layers: float
    change: float
    text: str


CHANGES = {
    "lower score": ("#d1495b", "v"),
    "the same": ("#3066be", "o"),
    "higher": ("#2a9d6f", "^"),
}
ROW, WIDTH = 4, 0.8
"""Dots on top of each other in a row of `prompts_by_task`, and the share of the room between two plans they fill."""


@matplotlib.rc_context(STYLE)
def prompts_by_task(dots: Sequence[Dot], n_layers: int, narrow: bool = False) -> str:
    """Each prompt as a dot: layers that ran, for each kind of prompt; the colour and form say how its score changed."""
    layers = {
        task: [dot.layers for dot in dots if dot.task == task] for task in dict.fromkeys(dot.task for dot in dots)
    }
    tasks = sorted(layers, key=lambda task: (mean(layers[task]), task))[::-1]
    groups = _places(dots, tasks, n_layers)
    figure, axes = drawing(HALF if narrow else WIDE, 1.1 + 0.42 * len(tasks))
    hovers = {}
    for place, (name, points) in enumerate(groups.items()):
        colour, marker = CHANGES[name]
        hovers[f"prompts-{place}"] = [text for _, _, text in points]
        xy = _columns([(x, y) for x, y, _ in points])
        size = 14 if narrow else 26
        axes.scatter(*xy, color=colour, marker=marker, s=size, lw=0, label=name, gid=f"prompts-{place}", zorder=3)
    axes.axvline(n_layers, color=INK, lw=1, ls=":")
    axes.set(xlabel=f"layers run, of {n_layers}")
    _name_rows(axes, tasks, 14 if narrow else 28)
    axes.legend(fontsize=9, loc="lower left", bbox_to_anchor=(0, 1), ncols=3, columnspacing=1, handletextpad=0.3)
    return to_svg(figure, f"prompts{NARROW * narrow}", "Layers that each test prompt ran, by kind of prompt", hovers)


def _places(dots: Sequence[Dot], tasks: Sequence[str], n_layers: int) -> dict[str, list[tuple[float, float, str]]]:
    """Name of `CHANGES` -> place and text of each dot; those of one task and one plan stand beside each other."""
    cells: dict[tuple[str, float], list[Dot]] = {}
    for dot in sorted(dots, key=lambda dot: dot.change):
        cells.setdefault((dot.task, dot.layers), []).append(dot)
    room = WIDTH * min(
        [after - before for before, after in pairwise(sorted({dot.layers for dot in dots}))], default=1.0
    )
    step = min([0.012 * n_layers, *(room * ROW / len(some) for some in cells.values())])
    groups: dict[str, list[tuple[float, float, str]]] = {name: [] for name in CHANGES}
    for (task, layers), some in cells.items():
        columns, rows = -(-len(some) // ROW), min(ROW, len(some))
        for place, dot in enumerate(some):
            x = layers + (place // ROW - (columns - 1) / 2) * step
            y = tasks.index(task) + 0.18 * (place % ROW - (rows - 1) / 2)
            groups[[*CHANGES][1 + (dot.change > 0) - (dot.change < 0)]].append((x, y, dot.text))
    return groups


@matplotlib.rc_context(STYLE)
def layers_by_task(layers: Mapping[str, tuple[float, float]], n_layers: int, colour: str) -> str:
    """For each kind of prompt: mean layers that the oracle needs and that the allocator, in its colour, ran."""
    tasks = sorted(layers, key=lambda task: (layers[task][1], task))[::-1]
    oracle, chosen = np.array([layers[task] for task in tasks]).T
    figure, axes = drawing(HALF, 0.9 + 0.3 * len(tasks))
    rows = np.arange(len(tasks))
    axes.hlines(rows, oracle, chosen, color=GRID, lw=6)
    axes.scatter(oracle, rows, color=colour_of("oracle"), s=60, label="least sufficient plan (flattered)", zorder=3)
    axes.scatter(chosen, rows, color=colour, s=60, label="allocator", zorder=3)
    axes.axvline(n_layers, color=INK, lw=1, ls=":")
    axes.set(xlabel=f"mean layers run, of {n_layers}")
    _name_rows(axes, tasks)
    axes.legend(fontsize=9, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    return to_svg(figure, "tasks", "Mean layers that each kind of prompt needs and runs")


@matplotlib.rc_context(STYLE)
def reliability(predictions: Mapping[str, tuple[NDArray[np.float32], NDArray[np.float64]]]) -> str:
    """Expected losses of shortened plans [N, K] against the true ones."""
    figure, axes = drawing(HALF, 4.4)
    axes.axline((0, 0), slope=1, color=MUTED, lw=0.8, ls=":")
    for name, (expected, losses) in predictions.items():
        predicted, observed, counts = _bins(expected[:, :-1].ravel(), losses[:, :-1].ravel())
        axes.plot(predicted, observed, color=colour_of(name), lw=1.2)
        axes.scatter(
            predicted,
            observed,
            color=colour_of(name),
            s=12 + 300 * counts / counts.sum(),
            alpha=0.8,
            label=title_of(name),
        )
    axes.set(xlabel="expected loss", ylabel="observed loss")
    axes.legend(fontsize=9, loc="upper left", markerscale=0.7)
    return to_svg(figure, "reliability", "Losses, as predicted and as observed")


@matplotlib.rc_context(STYLE)
def least_budgets(budgets: Sequence[float]) -> str:
    """The share of prompts that a budget suffices for, by their least sufficient plans."""
    figure, axes = drawing(HALF, 3.6)
    axes.ecdf(budgets, color=colour_of("oracle"), lw=2)
    axes.set(xlabel="budget (share of the decoder that runs)", ylabel="prompts that it suffices for", ylim=(0, 1.02))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda share, _: f"{share:.0%}")
    return to_svg(figure, "least_budgets", "Share of prompts that a budget suffices for")


def _bins(predicted: NDArray[np.float32], observed: NDArray[np.float64]) -> tuple[NDArray[np.float64], ...]:
    """Means of both, and counts, in those of ten bins of equal width that are not empty."""
    edges = np.linspace(np.nanmin(predicted), np.nanmax(predicted), 11)
    index = np.minimum(np.searchsorted(edges, predicted, side="right"), 10)
    used = np.unique(index)
    rows = [(predicted[index == i].mean(), observed[index == i].mean(), float((index == i).sum())) for i in used]
    return tuple(np.array(rows).T)


def _columns(points: Sequence[Point]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _draw_band(axes: Axes, band: Band, colour: str, label: str, ls: str) -> None:
    axes.fill_between(band.budgets, band.low, band.high, color=colour, alpha=0.13, lw=0)
    axes.plot(band.budgets, band.scores, color=colour, lw=1.8, ls=ls, label=label)


def _draw_spot(axes: Axes, x: Estimate, y: Estimate, colour: str, gid: str, label: str | None = None) -> None:
    """A dot and its intervals, as far as they are known."""
    if x.value is None or y.value is None:
        return
    if x.low is not None and x.high is not None:
        axes.hlines([y.value], [x.low], [x.high], color=colour, lw=1.2, alpha=0.8, zorder=3)
    if y.low is not None and y.high is not None:
        axes.vlines([x.value], [y.low], [y.high], color=colour, lw=1.2, alpha=0.8, zorder=3)
    axes.plot([x.value], [y.value], "o", color=colour, ms=8.5, mec="white", mew=1.2, zorder=4, gid=gid, label=label)


def _said(found: Estimate, form: str) -> str:
    """A value and its interval, as far as they are known."""
    if found.value is None:
        return "not known"
    interval = "" if found.low is None else f" ({found.low:{form}} to {found.high:{form}})"
    return f"{found.value:{form}}{interval}"


def _name_rows(axes: Axes, names: Sequence[str], longest: int = 20) -> None:
    """Names at the rows, from below, cut to so many letters; they are not read as formulas."""
    shown = [name if len(name) <= longest else f"{name[: longest - 1]}…" for name in names]
    axes.set_yticks(range(len(names)), shown, parse_math=False)
    axes.set_ylim(-0.6, len(names) - 0.4)
    axes.grid(axis="y", visible=False)
