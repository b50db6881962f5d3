"""The report's figures, as SVG text that scales with the page."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from oracle.frontier.frontier import Point

INK, MUTED, GRID = "#1d2733", "#6b7785", "#e3e8ee"
POLICIES = {
    "full": ("#1d2733", "full model"),
    "best_static": ("#8a6d3b", "best static plan"),
    "static_mixture": ("#b08d57", "static mixture, equal budget"),
    "random": ("#a0a8b3", "random, equal budget"),
    "oracle": ("#2a9d6f", "oracle (flattered)"),
    "lightgbm": ("#d1495b", "LightGBM"),
    "mlp": ("#3066be", "MLP"),
    "logistic": ("#7b5ea7", "logistic regression"),
    "shuffled": ("", "control: shuffled features"),
    "task": ("", "control: name of the task alone"),
    "embedding": ("", "control: mean embedding alone"),
}
"""Colours of policies, and what they are called."""
OTHERS = ("#2b8a8a", "#9c6644", "#5f7c3a", "#a23e8c", "#4f6d9a")
"""Colours of controllers from packages of somebody's own."""


def colour_of(name: str) -> str:
    """Of a policy; another controller has one of `OTHERS`, always the same."""
    return POLICIES.get(name, ("", ""))[0] or OTHERS[sum(name.encode()) % len(OTHERS)]


def title_of(name: str) -> str:
    """A policy in words; another controller has its own name."""
    return POLICIES.get(name, ("", name))[1]


STYLE: Any = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 11,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}
WIDE, HALF = 10.0, 4.8
"""Widths in inches of a figure that fills the page, and of one that fills half of it: texts have one size in both."""


@matplotlib.rc_context(STYLE)
def quality_against_budget(
    statics: Sequence[Point],
    mixture: Sequence[Point],
    oracles: Mapping[str, Sequence[Point]],
    curves: Mapping[str, Sequence[Point]],
    cards: Mapping[str, Point],
) -> str:
    """Mean score against mean budget: static plans and their mixtures, oracles, each controller at all prices,
    and each policy where it was set to work."""
    figure, axes = _drawing(WIDE, 5.2)
    for line, (name, oracle) in zip(("-", ":"), oracles.items(), strict=False):
        axes.plot(*_columns(oracle), color=colour_of("oracle"), lw=2, ls=line, label=name)
    axes.plot(*_columns(mixture), color=colour_of("static_mixture"), lw=1.5, ls="--", label="mixtures of static plans")
    axes.scatter(*_columns(statics), color=colour_of("static_mixture"), s=22, label="static plans", zorder=3)
    for name, curve in curves.items():
        axes.plot(*_columns(curve), color=colour_of(name), lw=1.8, label=f"{title_of(name)}, all prices")
    for name, (budget, quality) in cards.items():
        axes.scatter([budget], [quality], color=colour_of(name), s=70, edgecolor="white", lw=1.2, zorder=4)
    axes.axhline(cards["full"][1], color=MUTED, lw=0.8, ls=":")
    axes.set(xlabel="mean budget (share of the decoder that runs)", ylabel="mean score")
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:.0%}")
    axes.legend(fontsize=9, loc="lower right")
    return _svg(figure, "quality")


@matplotlib.rc_context(STYLE)
def layers_by_task(layers: Mapping[str, tuple[float, float]], n_layers: int, colour: str) -> str:
    """For each kind of prompt: mean layers that the oracle needs and that the allocator, in its colour, ran."""
    tasks = sorted(layers, key=lambda task: layers[task][1])
    oracle, chosen = np.array([layers[task] for task in tasks]).T
    figure, axes = _drawing(HALF, 0.9 + 0.3 * len(tasks))
    rows = np.arange(len(tasks))
    axes.hlines(rows, oracle, chosen, color=GRID, lw=6)
    axes.scatter(oracle, rows, color=colour_of("oracle"), s=60, label="least sufficient plan (flattered)", zorder=3)
    axes.scatter(chosen, rows, color=colour, s=60, label="allocator", zorder=3)
    axes.axvline(n_layers, color=INK, lw=1, ls=":")
    axes.set(xlabel=f"mean layers run, of {n_layers}", yticks=rows, yticklabels=tasks)
    axes.grid(axis="y", visible=False)
    axes.legend(fontsize=9, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    return _svg(figure, "tasks")


@matplotlib.rc_context(STYLE)
def reliability(predictions: Mapping[str, tuple[NDArray[np.float32], NDArray[np.float64]]]) -> str:
    """Expected losses of shortened plans [N, K] against the true ones."""
    figure, axes = _drawing(HALF, 4.4)
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
    return _svg(figure, "reliability")


@matplotlib.rc_context(STYLE)
def least_budgets(budgets: Sequence[float]) -> str:
    """The share of prompts that a budget suffices for, by their least sufficient plans."""
    figure, axes = _drawing(HALF, 3.6)
    axes.ecdf(budgets, color=colour_of("oracle"), lw=2)
    axes.set(xlabel="budget (share of the decoder that runs)", ylabel="prompts that it suffices for", ylim=(0, 1.02))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda share, _: f"{share:.0%}")
    return _svg(figure, "least_budgets")


def _bins(predicted: NDArray[np.float32], observed: NDArray[np.float64]) -> tuple[NDArray[np.float64], ...]:
    """Means of both, and counts, in those of ten bins of equal width that are not empty."""
    edges = np.linspace(predicted.min(), predicted.max(), 11)
    index = np.minimum(np.searchsorted(edges, predicted, side="right"), 10)
    used = np.unique(index)
    rows = [(predicted[index == i].mean(), observed[index == i].mean(), float((index == i).sum())) for i in used]
    return tuple(np.array(rows).T)


def _drawing(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure of so many inches and its axes."""
    figure = Figure(figsize=(width, height))
    return figure, figure.subplots()


def _columns(points: Sequence[Point]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _svg(figure: Figure, name: str) -> str:
    out = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(out, format="svg", bbox_inches="tight", transparent=True, metadata={"Date": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    return re.sub(
        r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1), count=1
    )
