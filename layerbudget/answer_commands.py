"""`layerbudget generate`, `compare` and `lm-eval`: answers with the layers that a saved allocator chooses."""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from backbone.interrupts import safe_place
from layerbudget.options import (
    AllocatorSource,
    ChatTemplateFile,
    Device,
    Keep,
    MaxNewTokens,
    ModelSource,
    OptionalPromptFile,
    OutFile,
    Overwrite,
    PromptFile,
    Stop,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from runtime.allocator import Allocator


def generate(
    allocator: AllocatorSource,
    prompt: Annotated[str | None, typer.Argument(help="The prompt to continue.")] = None,
    prompts: OptionalPromptFile = None,
    out: OutFile = None,
    model: ModelSource = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the prompt as it is, without the allocator's chat template.")
    ] = False,
    max_new_tokens: MaxNewTokens = None,
    stop: Stop = None,
    chat_template: ChatTemplateFile = None,
    keep: Keep = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts generated together.")] = 32,
    overwrite: Overwrite = False,
    device: Device = None,
) -> None:
    """Continue one prompt, or a file of prompts, each with the layers that the allocator chooses for it.

    A run over a file that was stopped goes on where it was, when the same command is given again.
    """
    if (prompt is None) == (prompts is None):
        raise typer.BadParameter("give either a prompt or --prompts FILE")
    if (prompts is None and out is not None) or (out is None and overwrite):
        raise typer.BadParameter("--out goes with --prompts FILE, and --overwrite with --out")
    if raw and prompt is None:
        raise typer.BadParameter('--raw goes with a prompt; in a file each line may say "raw": true')
    from oracle.prompts import check_lengths
    from runtime.answer_files import answer_file, check_places
    from runtime.output import summary_line

    if prompts is not None:
        check_places(prompts, out, overwrite=overwrite)
    loaded = loaded_allocator(allocator, max_new_tokens, stop, chat_template, keep)
    network, tokenizer = loaded_model(loaded, model, device)
    if prompt is not None:
        text = loaded.rendered(tokenizer, prompt, raw=raw)
        check_lengths(network, tokenizer, [("on the command line", text)], loaded.decoding.max_new_tokens)
        print_answers(loaded, network, tokenizer, [prompt], raw=raw)
    else:
        assert prompts is not None
        begun = time.perf_counter()
        with answers_bar() as (begin, advance):
            plans = answer_file(
                loaded,
                network,
                tokenizer,
                prompts,
                out,
                batch_size=batch_size,
                overwrite=overwrite,
                begin=begin,
                advance=advance,
            )
        if plans:  # beside the answers, which may go to the standard output
            typer.echo(summary_line(plans, loaded.menu, network, time.perf_counter() - begun), err=True)


def compare(
    allocator: AllocatorSource,
    prompts: PromptFile,
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
    from layerbudget import LayerPlan
    from runtime.answer_files import check_places
    from runtime.output import share_of_decoder
    from runtime.side_by_side import compare_file, summary

    check_places(prompts, out, overwrite=overwrite)
    loaded = loaded_allocator(allocator, max_new_tokens, stop, chat_template, keep)
    network, tokenizer = loaded_model(loaded, model, device)
    with answers_bar() as (begin, advance):
        lines = compare_file(
            loaded, network, tokenizer, prompts, out, overwrite=overwrite, begin=begin, advance=advance
        )
    if out is None:
        _print_table(lines)
    plans = [LayerPlan.parse(line["plan"], loaded.menu.n_layers) for line in lines]
    typer.echo(summary(lines, loaded.menu.n_layers, share_of_decoder(plans, loaded.menu, network)))


def lm_eval(context: typer.Context) -> None:
    """Score an allocator with lm-evaluation-harness: its command line, which then knows --model layerbudget."""
    from lm_eval.__main__ import cli_evaluate

    importlib.import_module("layerbudget.lm_eval_model")  # registers the model
    sys.argv = ["lm-eval", *context.args]
    cli_evaluate()


def loaded_allocator(
    source: str,
    max_new_tokens: int | None,
    stop: list[str] | None,
    chat_template: Path | None = None,
    keep: float | None = None,
) -> Allocator:
    """An allocator whose answers end as the command says, and otherwise as in training."""
    from dataclasses import replace

    from layerbudget import Allocator

    if stop and "" in stop:
        raise typer.BadParameter("--stop takes a string that is not empty")
    loaded = Allocator.from_pretrained(source, chat_template=chat_template, keep=keep)
    new_tokens, ends = max_new_tokens or loaded.decoding.max_new_tokens, tuple(stop or loaded.decoding.stop)
    return replace(loaded, decoding=replace(loaded.decoding, max_new_tokens=new_tokens, stop=ends))


def loaded_model(
    allocator: Allocator, source: str | None, device: str | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model that the command names, or else the allocator's, and its tokenizer."""
    from layerbudget import load_backbone

    named = allocator.model_source if source is None else source
    return load_backbone(named, device="auto" if device is None else device)


@contextmanager
def answers_bar() -> Iterator[tuple[Callable[[int, int], None], Callable[[int], None]]]:
    """A bar on the standard error, as two functions: `begin(done, total)` and `advance(done)`."""
    with typer.progressbar(length=1, label="Answers", file=sys.stderr) as bar:

        def begin(done: int, total: int) -> None:
            bar.length = total
            bar.update(done)

        def advance(done: int) -> None:
            bar.update(done)
            safe_place()

        yield begin, advance


def print_answers(
    allocator: Allocator,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    *,
    raw: bool = False,
) -> None:
    """Answers with the layers that they ran, one after the other."""
    from runtime.offline import generate_texts

    full, texts = allocator.menu.n_layers, [allocator.rendered(tokenizer, prompt, raw=raw) for prompt in prompts]
    answers = generate_texts(allocator.generate, model, tokenizer, texts, allocator.decoding)
    for prompt, answer in zip(prompts, answers, strict=True):
        typer.echo(f"\n{prompt}\n  {answer.text}\n  [{answer.plan.layers:g} of {full} layers: {answer.plan}]")


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
