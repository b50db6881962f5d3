"""`layerbudget inspect`: what a saved allocator holds, in words."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from layerbudget.report_card import print_report_card


def inspect(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="Folder or hub repository of a saved allocator.")],
) -> None:
    """Show a saved allocator: its model, menu, price, certificate and report card."""
    from layerbudget import Allocator

    allocator = Allocator.from_pretrained(folder)
    certificate = allocator.certificate
    typer.echo(f"Model        {allocator.model_source} ({allocator.fingerprint})")
    typer.echo(
        f"Controller   {allocator.controller_name}, reads {', '.join(allocator.projection.sets)} "
        f"from the first {allocator.menu.probe_depth} layers"
    )
    typer.echo(f"Decoding     {allocator.decoding}")
    chat = "none: prompts are given as they are"
    if allocator.chat is not None:
        chat = f"{allocator.chat.hash}: prompts are put into it"
    typer.echo(f"Template     {chat}")
    price = "none: every prompt runs the full model" if certificate.price is None else f"{certificate.price:.4g}"
    typer.echo(f"Price        {price}")
    typer.echo(f"Certificate  {certificate.sentence} Made on {certificate.date}.")
    for point in allocator.others:
        typer.echo(f"  keep={point.certificate.keep:g}: {point.certificate.sentence}")
    for sentence in certificate.does_not_cover:
        typer.echo(f"  does not cover: {sentence}")
    if allocator.outliers is not None:
        typer.echo(f"Outliers     {allocator.outliers.description}")
    if allocator.drift is not None:
        typer.echo(f"Drift alarm  {allocator.drift.description}")
    typer.echo(f"\nMenu of {len(allocator.menu)} plans:")
    for plan, budget in zip(allocator.menu.plans, allocator.menu.budgets, strict=True):
        typer.echo(f"  {budget:6.1%}  {plan.layers:4g} layers  {plan}")
    print_report_card(Path(folder).expanduser().parent / "metrics.json")
