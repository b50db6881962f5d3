"""`layerbudget inspect`: a saved allocator and the report card of its run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from backbone.errors import InputError
from backbone.strict_json import parse
from layerbudget.failures import visible

if TYPE_CHECKING:
    from runtime.allocator import Allocator


def inspect(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="Folder or hub repository of a saved allocator.")],
) -> None:
    """Show a saved allocator: its model, menu, price, certificate and report card."""
    from layerbudget import Allocator
    from runtime.saving.allocator_files import run_folder

    for line in _described(Allocator.from_pretrained(folder)):
        typer.echo(visible(line))
    print_report_card(run_folder(folder) / "metrics.json")


def _described(allocator: Allocator) -> Iterator[str]:
    certificate = allocator.certificate
    yield f"Model        {allocator.model_source} ({allocator.fingerprint})"
    yield (
        f"Controller   {allocator.controller_name}, reads {', '.join(allocator.projection.sets)} "
        f"from the first {allocator.menu.probe_depth} layers"
    )
    yield f"Decoding     {allocator.decoding}"
    chat = "none: prompts are used unchanged"
    if allocator.chat is not None:
        chat = f"{allocator.chat.hash}: prompts are rendered with it"
    yield f"Template     {chat}"
    yield f"Decides by   {allocator.decides_by}"
    yield f"Certificate  {certificate.sentence} Made on {certificate.date}."
    for point in allocator.others:
        yield f"  keep={point.certificate.keep:g}: {point.certificate.sentence}"
    for sentence in certificate.does_not_cover:
        yield f"  does not cover: {sentence}"
    if allocator.outliers is not None:
        yield f"Outliers     {allocator.outliers.description}"
    if allocator.drift is not None:
        yield f"Drift alarm  {allocator.drift.description}"
    yield ""
    yield f"Menu of {len(allocator.menu)} plans:"
    for plan, budget in zip(allocator.menu.plans, allocator.menu.budgets, strict=True):
        yield f"  {budget:6.1%}  {plan.layers:4g} layers  {plan}"


def print_report_card(path: Path) -> None:
    """Print the figures on the test split from a run's `metrics.json`, if that file exists.

    Raises:
        InputError: a damaged file.
    """
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
        yield f"  {metrics['best']} captures {interval} of the headroom over static plans; the oracle is an upper bound"
