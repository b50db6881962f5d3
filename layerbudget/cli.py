"""The command line: `layerbudget run CONFIG` and its single stages, `generate`, `inspect`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

import layerbudget
from layerbudget import check_not_shadowed
from layerbudget.failures import sentence_of
from layerbudget.report_card import print_report_card

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from pipelines.config import Config
    from runtime.allocator import Allocator

app = typer.Typer(
    help="Learn how many decoder layers each prompt needs, and run only those.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

ConfigFile = Annotated[
    Path, typer.Argument(metavar="CONFIG", readable=False, help="YAML file of the run, such as configs/demo.yaml.")
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Put a value over the file's; may be given again."),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N; default: CUDA where there is one.")]

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""

STAGES = {
    "menu": "Find the plans that prompts choose from.",
    "adapt": "Make the shortened plans better: bridges, adapters.",
    "label": "Answer and judge every prompt under every plan; resumes where it stopped.",
    "features": "Read the states of the first layers of every prompt.",
    "tune": "Search the controllers' settings with Optuna; resumes where it stopped.",
    "train": "Train the controllers.",
    "calibrate": "Certify a price and save the allocator.",
    "evaluate": "Measure all policies on unseen prompts.",
    "report": "Write report.html and log the run to MLflow.",
}


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"layerbudget {layerbudget.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """What comes before the command."""


@app.command()
def run(config: ConfigFile, settings: Settings = None, device: Device = None) -> None:
    """Run every stage in order. Skips what is done, resumes what is not, redoes what the settings changed."""
    from pipelines.runner import run_all

    loaded = _config(config, settings, device)
    run_all(loaded)
    _answer_try_prompts(loaded)


def _config(path: Path, settings: list[str] | None, device: str | None) -> Config:
    from pipelines.config import load_config

    return load_config(path, [*(settings or []), *([f"model.device={device}"] if device else [])])


def _answer_try_prompts(config: Config) -> None:
    from pipelines.workspace import Workspace
    from runtime.allocator import Allocator

    if config.try_prompts:
        allocator = Allocator.from_pretrained(config.folder / "allocator")
        _print_answers(allocator, *Workspace.of(config).adapted, config.try_prompts)
    typer.echo(f"Report: {config.folder / 'report.html'}")


def _print_answers(
    allocator: Allocator, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str]
) -> None:
    from runtime.texts import generate_texts

    full = allocator.menu.n_layers
    for prompt, answer in zip(
        prompts, generate_texts(allocator.generate, model, tokenizer, prompts, allocator.decoding), strict=True
    ):
        typer.echo(f"\n{prompt}\n  {answer.text}\n  [{answer.plan.layers:g} of {full} layers: {answer.plan}]")


def _add_stage(name: str, text: str) -> None:
    def stage(config: ConfigFile, settings: Settings = None, device: Device = None) -> None:
        from pipelines.runner import run_one

        run_one(_config(config, settings, device), name)

    app.command(name, help=text, rich_help_panel="Single stages")(stage)


@app.command(help=STAGES["label"], rich_help_panel="Single stages")
def label(
    config: ConfigFile,
    settings: Settings = None,
    device: Device = None,
    shard: Annotated[
        str | None,
        typer.Option(metavar="N/OF", help="Label one part only, such as 3/8; other processes may label the others."),
    ] = None,
) -> None:
    from oracle.prompts import Shard
    from pipelines.runner import run_one, run_shard

    loaded = _config(config, settings, device)
    if shard is None:
        run_one(loaded, "label")
    else:
        run_shard(loaded, Shard.parse(shard))


for _name, _text in STAGES.items():
    if _name != "label":
        _add_stage(_name, _text)


@app.command()
def generate(
    allocator: Annotated[str, typer.Option(metavar="DIR", help="Folder or hub repository of a saved allocator.")],
    prompt: Annotated[str | None, typer.Argument(help="The prompt to continue.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(metavar="FILE.jsonl", readable=False, help="Prompts, one a line, with id and prompt.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE.jsonl", readable=False, help="Where answers go; default: the terminal.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(metavar="M", help="Where to load the model from; default: as in training.")
    ] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Default: as in training.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts generated together.")] = 32,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file that --out names.")] = False,
    device: Device = None,
) -> None:
    """Continue one prompt, or a file of prompts, each with the layers that the allocator chooses for it.

    A run over a file that was stopped goes on where it was, when the same command is given again.
    """
    if (prompt is None) == (prompts is None):
        raise typer.BadParameter("give either a prompt or --prompts FILE.jsonl")
    if (prompts is None and out is not None) or (out is None and overwrite):
        raise typer.BadParameter("--out goes with --prompts FILE.jsonl, and --overwrite with --out")
    from dataclasses import replace

    from layerbudget import Allocator, load_backbone
    from oracle.context_lengths import check_lengths
    from runtime.answer_files import answer_file, check_places

    if prompts is not None:
        check_places(prompts, out, overwrite=overwrite)
    loaded = Allocator.from_pretrained(allocator)
    if max_new_tokens:
        loaded = replace(loaded, decoding=replace(loaded.decoding, max_new_tokens=max_new_tokens))
    network, tokenizer = load_backbone(model or loaded.model_source, device=device or "auto")
    if prompt is not None:
        check_lengths(network, tokenizer, [("on the command line", prompt)], loaded.decoding.max_new_tokens)
        _print_answers(loaded, network, tokenizer, [prompt])
    else:
        assert prompts is not None
        with typer.progressbar(length=1, label="Answers", file=sys.stderr) as bar:

            def begin(done: int, total: int) -> None:
                bar.length = total
                bar.update(done)

            answer_file(
                loaded,
                network,
                tokenizer,
                prompts,
                out,
                batch_size=batch_size,
                overwrite=overwrite,
                begin=begin,
                advance=bar.update,
            )


@app.command()
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
    price = "none: every prompt runs the full model" if certificate.price is None else f"{certificate.price:.4g}"
    typer.echo(f"Price        {price}")
    typer.echo(f"Certificate  {certificate.sentence} Made on {certificate.date}.")
    for sentence in certificate.does_not_cover:
        typer.echo(f"  does not cover: {sentence}")
    if allocator.drift is not None:
        typer.echo(f"Drift alarm  {allocator.drift.description}")
    typer.echo(f"\nMenu of {len(allocator.menu)} plans:")
    for plan, budget in zip(allocator.menu.plans, allocator.menu.budgets, strict=True):
        typer.echo(f"  {budget:6.1%}  {plan.layers:4g} layers  {plan}")
    print_report_card(Path(folder).expanduser().parent / "metrics.json")


def main() -> None:
    """Entry point: what is the input's fault or the machine's becomes one sentence and status 2; Ctrl-C becomes status
    130. Any other exception is a fault of ours and shows where it happened."""
    try:
        check_not_shadowed()
        from backbone.errors import InputError
    except ImportError as error:
        sys.exit(f"error: {error}")
    try:
        try:
            app()
        finally:
            sys.stdout.flush()
    except InputError as error:
        _refuse(str(error))
    except ModuleNotFoundError as error:
        _refuse(f"{error.name!r} is not installed; `pip install 'layerbudget[pipelines]'` brings it")
    except BrokenPipeError:
        _stop_quietly()
    except SystemExit as stop:
        if stop.code == INTERRUPTED:
            typer.echo("stopped; the same command goes on from here", err=True)
        raise
    except Exception as error:
        sentence = sentence_of(error)
        if sentence is None:
            raise
        _refuse(sentence)


def _refuse(sentence: str) -> NoReturn:
    typer.echo(f"error: {' '.join(sentence.split())}", err=True)
    sys.exit(2)


def _stop_quietly() -> NoReturn:
    """Whoever read our output has gone, for example `head`; what is still to be flushed goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(1)
