"""`layerbudget init` and `layerbudget try`: a configuration for a model and prompts, and whether it is worth a run."""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from backbone.errors import InputError
from layerbudget.failures import visible
from layerbudget.options import Device, Overwrite

if TYPE_CHECKING:
    from pipelines.proposal import Proposal

HERE = Path(__file__).resolve().parent
WIDTH = 120

Columns = Annotated[
    list[str] | None,
    typer.Option("--column", metavar="FIELD=NAME", help="The column of prompt, reference, id or task; repeatable."),
]
ConfigOut = Annotated[
    Path | None, typer.Option("--out", metavar="FILE", readable=False, help="The YAML file; default: PROMPTS.yaml.")
]


def init(
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help="Hub id, folder, .gguf or package:NAME.")] = None,
    prompts: Annotated[str | None, typer.Argument(metavar="PROMPTS", help="A file of prompts or a data set.")] = None,
    out: ConfigOut = None,
    column: Columns = None,
    example: Annotated[
        str | None, typer.Option(metavar="NAME", help="Write a configuration that comes with layerbudget instead.")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Write a commented configuration for a model and a file of prompts, and say why each value is what it is."""
    if example is not None:
        if model is not None:
            raise typer.BadParameter("--example goes without MODEL and PROMPTS")
        name, text = f"{example.removesuffix('.yaml')}.yaml", _example(example)
        _write(out or Path(name), text, overwrite=overwrite)
        return
    if model is None or prompts is None:
        raise typer.BadParameter("give MODEL and PROMPTS, or --example NAME")
    _check_free(out or Path(_default_name(prompts)), overwrite=overwrite)
    path, proposal = _proposed(model, prompts, out, _named(column))
    _say(proposal)
    for line in _check(path, proposal):
        typer.echo(line)
    _write(path, proposal.yaml(f"layerbudget run {path}"), overwrite=overwrite)
    tried = shlex.join(["layerbudget", "try", model, prompts, "--out", str(path)])
    typer.echo(f"`{tried}` says whether it is worth it; `layerbudget run {path}` makes the allocator.")


def try_prompts(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Hub id, folder, .gguf or package:NAME.")],
    prompts: Annotated[str, typer.Argument(metavar="PROMPTS", help="A file of prompts or a data set.")],
    minutes: Annotated[float, typer.Option(min=1, help="Time for all stages.")] = 10.0,
    out: ConfigOut = None,
    column: Columns = None,
    device: Device = None,
) -> None:
    """Say whether an allocator is worth it for a model and prompts, and why: all stages on as many as fit in the time.

    `layerbudget run FILE` goes on from there with all prompts. A FILE that is there is taken as it stands.
    """
    from pipelines.trial import run_trial

    settings = [] if device is None else [f"model.device={device!r}"]
    path = out or Path(_default_name(prompts))
    if path.exists():
        _check_same(path, model, prompts)
        typer.echo(f"{path} is there and is taken as it stands")
    else:
        path, proposal = _proposed(model, prompts, out, _named(column), device)
        _say(proposal)
        _check(path, proposal)
        _write(path, proposal.yaml(f"layerbudget run {path}"), overwrite=False)
    found = run_trial(path, settings, minutes)
    typer.echo("")
    for sentence in found.sentences:
        typer.echo(textwrap.fill(visible(sentence), WIDTH))
    typer.echo(f"`layerbudget run {path}` goes on with all prompts.")


def _example(name: str) -> str:
    folder = next(path for path in (HERE / "configs", HERE.parent / "configs") if path.is_dir())
    known = {path.stem: path for path in folder.glob("*.yaml")}
    if (path := known.get(name.removesuffix(".yaml"))) is None:
        raise InputError(f"no example {name!r}; there are {', '.join(sorted(known))}")
    return path.read_text(encoding="utf-8")


def _named(columns: list[str] | None) -> dict[str, str]:
    pairs = [column.partition("=") for column in columns or []]
    if wrong := next((field for field, equals, name in pairs if not equals or not name), None):
        raise InputError(f"--column takes FIELD=NAME, such as prompt=question, got {wrong!r}")
    return {field: name for field, _, name in pairs}


def _default_name(prompts: str) -> str:
    from pipelines.proposal import run_name

    return f"{run_name(prompts)}.yaml"


def _proposed(
    model: str, prompts: str, out: Path | None, columns: Mapping[str, str], device: str | None = None
) -> tuple[Path, Proposal]:
    from pipelines.proposal import propose, run_name
    from pipelines.proposal_inputs import AskedModel

    path = out or Path(_default_name(prompts))
    return path, propose(AskedModel(model, device or "auto"), prompts, columns=columns, name=run_name(str(path)))


def _say(proposal: Proposal) -> None:
    for decision in proposal.decisions:
        typer.echo(visible(f"{decision.key:<25} {decision.text:<40}  {decision.why}"))


def _check(path: Path, proposal: Proposal) -> list[str]:
    """What `layerbudget check` says of the file. Raises ConfigError for whatever it would refuse."""
    from pipelines.config import checked_config
    from pipelines.run.check import check_run

    return check_run(checked_config({**proposal.values, "file": str(path.resolve())}))


def _check_same(path: Path, model: str, prompts: str) -> None:
    from pipelines.config import load_config

    config = load_config(path)
    for what, mine, theirs in (
        ("model", model, config.model.source),
        ("prompts", prompts, config.data.path),
    ):
        if mine != theirs:
            raise InputError(f"{path} is there for the {what} {theirs}, not {mine}; name another file with --out")


def _check_free(path: Path, *, overwrite: bool) -> None:
    if path.exists() and not overwrite:
        raise InputError(f"{path} is there already; name another file with --out, or replace it with --overwrite")


def _write(path: Path, text: str, *, overwrite: bool) -> None:
    from backbone.files import write_atomically

    _check_free(path, overwrite=overwrite)
    write_atomically(path, text)
    typer.echo(f"written: {path}")
