"""`layerbudget compare`: the full model's answers and the allocator's, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from layerbudget.answer_commands import answers_bar, loaded_allocator
from layerbudget.options import (
    AllocatorSource,
    ChatTemplateFile,
    Device,
    Keep,
    MaxNewTokens,
    ModelSource,
    OutFile,
    Overwrite,
    Stop,
)


def compare(
    allocator: AllocatorSource,
    prompts: Annotated[
        Path,
        typer.Option(metavar="FILE", readable=False, help="JSONL, CSV, TSV or JSON with prompt or messages."),
    ],
    out: OutFile = None,
    model: ModelSource = None,
    max_new_tokens: MaxNewTokens = None,
    stop: Stop = None,
    chat_template: ChatTemplateFile = None,
    keep: Keep = None,
    overwrite: Overwrite = False,
    device: Device = None,
) -> None:
    """Answer each prompt twice, with the full model and with the layers that the allocator chooses, one at a time.

    Shows both answers, the layers and the times; with --out they go into a file, a line each.
    """
    if out is None and overwrite:
        raise typer.BadParameter("--overwrite goes with --out")
    from layerbudget import LayerPlan, load_backbone
    from runtime.answer_files import check_places
    from runtime.output import share_of_decoder
    from runtime.side_by_side import compare_file, summary

    check_places(prompts, out, overwrite=overwrite)
    loaded = loaded_allocator(allocator, max_new_tokens, stop, chat_template, keep)
    network, tokenizer = load_backbone(
        loaded.model_source if model is None else model, device="auto" if device is None else device
    )
    with answers_bar() as (begin, advance):
        lines = compare_file(
            loaded, network, tokenizer, prompts, out, overwrite=overwrite, begin=begin, advance=advance
        )
    if out is None:
        _print_table(lines)
    plans = [LayerPlan.parse(line["plan"], loaded.menu.n_layers) for line in lines]
    typer.echo(summary(lines, loaded.menu.n_layers, share_of_decoder(plans, loaded.menu, network)))


def _asked(line: dict[str, Any]) -> str:
    """The prompt, or the last turn of a conversation."""
    return str(line["prompt"] if "prompt" in line else line["messages"][-1]["content"])


def _print_table(lines: Sequence[dict[str, Any]]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, show_lines=True, expand=True)
    for heading, share in {"prompt": 3, "full model": 4, "allocator": 4}.items():
        table.add_column(heading, ratio=share, overflow="fold")
    for line in lines:
        same = line["full"] == line["allocated"]
        figures = f"{line['layers']:g} layers, {line['allocated_ms']:.0f} ms{', the same' if same else ''}"
        table.add_row(
            Text(_asked(line)),
            Text(f"{line['full']}\n[{line['full_ms']:.0f} ms]"),
            Text(f"{line['allocated']}\n[{figures}]", style="" if same else "yellow"),
        )
    Console().print(table)
