"""SVG text that scales with a page: its style, the colours and names of policies, and texts under the pointer."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK, MUTED, GRID = "#1d2733", "#6b7785", "#e3e8ee"
POLICIES = {
    "full": ("#1d2733", "full model"),
    "full_with_head": ("", "full model with a fitted head"),
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


def themed(text: str) -> str:
    """An SVG of a page, whose texts, lines and edges of dots have the page's own colours, light or dark."""
    for colour, name in ((INK, "ink"), (MUTED, "muted"), (GRID, "line"), ("#ffffff", "card")):
        text = text.replace(colour, f"var(--{name})")
    return text


def drawing(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure of so many inches and its axes."""
    figure = Figure(figsize=(width, height))
    return figure, figure.subplots()


def to_svg(figure: Figure, name: str, title: str, hovers: Mapping[str, Sequence[str]] | None = None) -> str:
    """The figure as an element of a page, without sizes and ids of groups.

    Args:
        figure: to be drawn.
        name: makes the other ids its own.
        title: said by screen readers.
        hovers: gid of an artist -> text of each of its marks, which a browser shows under the pointer.
    """
    out = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(out, format="svg", bbox_inches="tight", transparent=True, metadata={"Date": None})
    text = out.getvalue()
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    for gid, texts in (hovers or {}).items():
        text = _with_hovers(text, gid, texts)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    size = re.compile(r' (?:width|height)="[^"]*"')
    head, rest = text.split(">", 1)
    return f'{size.sub("", head)} role="img" aria-label="{escape(title)}">{rest}'


def _with_hovers(text: str, gid: str, texts: Sequence[str]) -> str:
    """The SVG in which each mark of a group bears its title, as plain text."""
    left = iter(texts)

    def titled(mark: re.Match[str]) -> str:
        return f"<{mark[1]}{mark[2]}><title>{escape(next(left))}</title></{mark[1]}>"

    def group(found: re.Match[str]) -> str:
        head, drawn = found[1], found[2]
        return head + re.sub(r"<(use|path)\b([^>]*)/>", titled, drawn)

    return re.sub(rf'(<g id="{gid}">\s*(?:<defs>.*?</defs>)?)(.*?)(?=<g id=|</svg>)', group, text, flags=re.DOTALL)
