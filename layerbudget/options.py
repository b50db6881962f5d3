"""Arguments and options that several commands have."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import Annotated

import typer

LOCAL = "local"
"""The value of `pipelines.ray.distributed.LOCAL`, whose import is slow."""

ConfigFile = Annotated[
    Path, typer.Argument(metavar="CONFIG", readable=False, help="YAML file of the run, such as configs/demo.yaml.")
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a value of the file; may be given again."),
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
ChatTemplateFile = Annotated[
    Path | None,
    typer.Option(
        "--chat-template",
        metavar="FILE",
        readable=False,
        help="The chat template as in training (data.chat_template: FILE); default: the tokenizer's own.",
    ),
]
Keep = Annotated[
    float | None, typer.Option("--keep", help="Certified bound to run at, such as 0.95; default: the allocator's own.")
]
Stop = Annotated[
    list[str] | None,
    typer.Option(
        "--stop", metavar="STRING", help="Answers end before this string; may be given again. Default: as in training."
    ),
]
_PROMPT_FILE = typer.Option(
    "--prompts", metavar="FILE", readable=False, help="JSONL, CSV, TSV or JSON with prompt or messages."
)
PromptFile = Annotated[Path, _PROMPT_FILE]
OptionalPromptFile = Annotated[Path | None, _PROMPT_FILE]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the file that --out names.")]
Ray = Annotated[
    str | None,
    typer.Option(
        "--ray",
        metavar="[ADDRESS]",
        help="Do the work on a Ray cluster: HOST:PORT, or `auto` for a cluster that runs on this machine. Without an "
        "address a cluster of this machine's cores is started.",
    ),
]


def with_ray_address(arguments: Sequence[str]) -> list[str]:
    """Give `--ray` without an address the value `local`.

    Typer has no options whose value may be left out. What follows `--` stays as it is.
    """
    own = [*takewhile(lambda word: word != "--", arguments)]
    pairs = zip(own, [*own[1:], "-"], strict=False)
    given = [f"--ray={LOCAL}" if word == "--ray" and after.startswith("-") else word for word, after in pairs]
    return [*given, *arguments[len(own) :]]
