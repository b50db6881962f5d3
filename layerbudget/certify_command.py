"""`layerbudget certify`: a new certificate for a saved allocator, from later prompts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from layerbudget.failures import visible
from layerbudget.options import ChatTemplateFile, Device, ModelSource

if TYPE_CHECKING:
    from pipelines.certify import Certified


def certify(
    allocator: Annotated[str, typer.Argument(metavar="DIR", help="Folder or hub repository of a saved allocator.")],
    prompts: Annotated[
        Path,
        typer.Option(metavar="FILE", readable=False, help="JSONL, CSV, TSV or JSON of prompts new to the allocator."),
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", readable=False, help="Where to save; default: the allocator's folder."),
    ] = None,
    judge: Annotated[str | None, typer.Option(help="Judge for prompts that name none.")] = None,
    split: Annotated[str, typer.Option(help="Split of a data set or of lm_eval:TASK in --prompts.")] = "train",
    model: ModelSource = None,
    chat_template: ChatTemplateFile = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts answered together.")] = 32,
    device: Device = None,
) -> None:
    """Certify a saved allocator on later prompts, without training; resumes where it stopped.

    Each prompt is answered in full and under every plan that a price could choose. If no bound is certified, nothing
    is saved and the exit status is 1.
    """
    from pipelines.certify import certify_file

    found = certify_file(
        allocator,
        prompts,
        out=out,
        model=model,
        judge=judge,
        split=split,
        chat_template=chat_template,
        batch_size=batch_size,
        device="auto" if device is None else device,
    )
    for line in _comparison(found):
        typer.echo(visible(line))
    if found.folder is None:
        typer.echo(f"Nothing is saved: no bound is certified on these prompts. {allocator} is unchanged.")
        raise typer.Exit(1)
    typer.echo(f"Saved to {found.folder}. The old certificate is kept there as certificate-DATE.json.")
    if found.folder.name == "allocator" and (found.folder.parent / "run.json").is_file():
        typer.echo("A later `layerbudget run` of this run restores the old certificate; --out DIR keeps both.")


def _comparison(found: Certified) -> Iterator[str]:
    """For each bound its old and its new certificate, in a sentence each."""
    for keep, new in found.after.items():
        old = found.before.get(keep)
        yield f"keep={keep:g}"
        yield f"  before  {old.date}  {old.sentence}" if old else "  before  not certified"
        yield f"  now     {new.date}  {new.sentence}"
