"""Arguments and options that several commands have."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

LOCAL = "local"
"""See `pipelines.ray.distributed.LOCAL`, which is not imported here, since it takes long."""

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
    float | None, typer.Option("--keep", help="Another certified bound to run at, such as 0.95; default: its own.")
]
Stop = Annotated[
    list[str] | None,
    typer.Option(
        "--stop", metavar="STRING", help="Answers end before it; may be given again. Default: as in training."
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
        help="Let the workers of a Ray cluster do it: HOST:PORT, `auto` for one that runs on this machine; without an "
        "address one of this machine's cores is started.",
    ),
]


def with_ray_address(arguments: Sequence[str]) -> list[str]:
    """The arguments with a bare `--ray` as `--ray=local`.

    Typer has no options whose value may be left out.
    """
    following = [*arguments[1:], "-"]
    alone = [word == "--ray" and after.startswith("-") for word, after in zip(arguments, following, strict=False)]
    return [f"--ray={LOCAL}" if bare else word for word, bare in zip(arguments, alone, strict=True)]
