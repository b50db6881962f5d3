"""Arguments and options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ConfigFile = Annotated[
    Path, typer.Argument(metavar="CONFIG", readable=False, help="YAML file of the run, such as configs/demo.yaml.")
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Put a value over the file's; may be given again."),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N; default: CUDA where there is one.")]
AllocatorSource = Annotated[
    str, typer.Option("--allocator", metavar="DIR", help="Folder or hub repository of a saved allocator.")
]
ModelSource = Annotated[
    str | None, typer.Option("--model", metavar="M", help="Where to load the model from; default: as in training.")
]
OutFile = Annotated[
    Path | None,
    typer.Option("--out", metavar="FILE.jsonl", readable=False, help="Where answers go; default: the terminal."),
]
MaxNewTokens = Annotated[int | None, typer.Option("--max-new-tokens", min=1, help="Default: as in training.")]
Stop = Annotated[
    list[str] | None,
    typer.Option(
        "--stop", metavar="STRING", help="Answers end before it; may be given again. Default: as in training."
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the file that --out names.")]
