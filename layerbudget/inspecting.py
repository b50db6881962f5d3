"""`layerbudget inspect`: what a saved allocator holds, in words."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from layerbudget.failures import visible
from layerbudget.report_card import print_report_card

if TYPE_CHECKING:
    from runtime.allocator import Allocator


def inspect(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="Folder or hub repository of a saved allocator.")],
) -> None:
    """Show a saved allocator: its model, menu, price, certificate and report card."""
    from layerbudget import Allocator

    for line in _described(Allocator.from_pretrained(folder)):
        typer.echo(visible(line))
    print_report_card(Path(folder).expanduser().parent / "metrics.json")


def _described(allocator: Allocator) -> Iterator[str]:
    certificate = allocator.certificate
    yield f"Model        {allocator.model_source} ({allocator.fingerprint})"
    yield (
        f"Controller   {allocator.controller_name}, reads {', '.join(allocator.projection.sets)} "
        f"from the first {allocator.menu.probe_depth} layers"
    )
    yield f"Decoding     {allocator.decoding}"
    chat = "none: prompts are given as they are"
    if allocator.chat is not None:
        chat = f"{allocator.chat.hash}: prompts are put into it"
    yield f"Template     {chat}"
    price = "none: every prompt runs the full model" if certificate.price is None else f"{certificate.price:.4g}"
    yield f"Price        {price}"
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
