"""The report card of a run, as `layerbudget inspect` prints it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from layerbudget.failures import visible


def print_report_card(path: Path) -> None:
    """Print the test figures in `metrics.json`, of the run that an allocator lies in; nothing if it is gone.

    Raises:
        InputError: a damaged file.
    """
    from backbone.errors import InputError
    from backbone.strict_json import parse

    if not path.is_file():
        return
    try:
        lines = list(_report_card(parse(path.read_text(encoding="utf-8")), path))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{path} is damaged; `layerbudget evaluate CONFIG` makes it again") from None
    typer.echo()
    for line in lines:
        typer.echo(visible(line))


def _report_card(metrics: dict[str, Any], path: Path) -> Iterator[str]:
    yield f"Report card, on {metrics['prompts']['test']:d} unseen prompts ({path}):"
    yield f"  {'policy':<16}{'score':>8}{'of full':>9}{'layers':>8}{'budget':>8}{'lost':>8}{'tokens/s':>10}"
    cards = {name: card for name, card in metrics.items() if isinstance(card, dict) and "quality_ratio" in card}
    if missing := {"full", metrics["best"]} - set(cards):
        raise KeyError(missing)
    for name, card in cards.items():
        yield (
            f"  {name:<16}{card['quality']:>8.3f}{card['quality_ratio']:>9.1%}{card['layers']:>8.2f}"
            f"{card['budget']:>8.1%}{card['loss']:>8.1%}{card['tokens_per_s']:>10.1f}"
        )
    if metrics["captured_headroom"] is not None:
        found = metrics["frontier"]["captured_headroom"]
        interval = f"{found['value']:.0%} ({found['low']:.0%} to {found['high']:.0%})"
        yield f"  {metrics['best']} captures {interval} of the headroom over static plans, by an oracle that flatters"
