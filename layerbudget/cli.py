"""The `layerbudget` command line, and the exit status of its commands."""

from __future__ import annotations

import io
import os
import select
import sys
from typing import Annotated, Any, NoReturn, TextIO

import typer
from typer.core import TyperGroup

import layerbudget
from backbone.errors import InputError
from backbone.interrupts import INTERRUPTED, say_stopped, stoppable
from layerbudget.answer_commands import compare, generate, lm_eval
from layerbudget.certify_command import certify
from layerbudget.failures import sentence_of, visible
from layerbudget.inspection import inspect
from layerbudget.options import with_ray_address
from layerbudget.serving_commands import export, serve
from layerbudget.stage_commands import STAGES, check, merge, run, search, stage_command
from layerbudget.verdict_commands import init, try_prompts


class _Commands(TyperGroup):
    def invoke(self, context: Any) -> Any:
        """Run a command. Typer takes every broken pipe for one of ours, and ends without a word."""
        try:
            return super().invoke(context)
        except BrokenPipeError as error:
            if any(map(_has_lost_reader, (sys.stdout, sys.stderr))):
                raise
            raise InputError(
                "another process that works for this command has ended; start the command again"
            ) from error


def _has_lost_reader(stream: TextIO) -> bool:
    """Whether nobody reads a stream any more, also where that cannot be known."""
    if not hasattr(select, "poll"):  # Windows
        return True
    poll = select.poll()
    try:
        poll.register(stream.fileno(), 0)
    except (OSError, ValueError):  # no file
        return False
    return any(event & select.POLLERR for _, event in poll.poll(0))


app = typer.Typer(
    cls=_Commands,
    help="Learn how many decoder layers each prompt needs, and run only those.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

PIPELINES = "datasets jinja2 mapie matplotlib mlflow optuna peft pyarrow pydantic rich rouge_score scipy sklearn yaml"
EXTRAS = {"serve": "fastapi httpx2 prometheus_client uvicorn", "lm-eval": "lm_eval", "pipelines": PIPELINES}
"""Extra of this package -> modules that the extra installs and only some commands import."""
ALL_ARGUMENTS = {"allow_extra_args": True, "ignore_unknown_options": True}
"""Settings of a command that passes its arguments on to another program."""


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
    """Options that come before the name of a command."""


app.command()(init)
app.command("try")(try_prompts)
app.command()(run)
app.command()(check)
app.command()(generate)
app.command()(compare)
app.command("lm-eval", add_help_option=False, context_settings=ALL_ARGUMENTS)(lm_eval)
app.command()(inspect)
app.command()(certify)
app.command()(serve)
app.command()(export)
app.command(rich_help_panel="Single stages")(merge)
app.command()(search)
for _name, _text in STAGES.items():
    app.command(_name, help=_text, rich_help_panel="Single stages")(stage_command(_name))


def main() -> None:
    """Run the command line: bad input and failures of the machine end with one sentence and status 2, Ctrl-C with 130.

    Any other exception is a bug of layerbudget and keeps its traceback."""
    _escape_unencodable_output()
    try:
        with stoppable():
            try:
                app(with_ray_address(sys.argv[1:]))
            finally:
                sys.stdout.flush()
    except InputError as error:
        _refuse(str(error))
    except ModuleNotFoundError as error:
        if not error.name:
            _refuse(f"a package is not installed: {error}")
        name = error.name.partition(".")[0]
        extra = next((extra for extra, names in EXTRAS.items() if name in names.split()), None)
        bring = f"`pip install 'layerbudget[{extra}]'` brings it" if extra else "install the package that holds it"
        _refuse(f"{name!r} is not installed; {bring}")
    except BrokenPipeError:
        _stop_quietly()
    except SystemExit as stop:
        if stop.code == INTERRUPTED:
            say_stopped()
        raise
    except Exception as error:
        sentence = sentence_of(error)
        if sentence is None:
            raise
        _refuse(sentence)


def _escape_unencodable_output() -> None:
    """Print characters that the terminal's encoding lacks as escapes, instead of failing on a prompt or an answer."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _refuse(sentence: str) -> NoReturn:
    typer.echo(f"error: {visible(' '.join(sentence.split()))}", err=True)
    sys.exit(2)


def _stop_quietly() -> NoReturn:
    """Discard the rest of the output after its reader, for example `head`, has ended."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(1)
