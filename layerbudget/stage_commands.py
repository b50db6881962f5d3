"""`layerbudget run CONFIG` and its single stages."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from backbone.errors import InputError
from layerbudget.answer_commands import print_answers
from layerbudget.options import ConfigFile, Device, Ray, Settings

if TYPE_CHECKING:
    from pipelines.config import Config
    from pipelines.run.workspace import Workspace

STAGES = {
    "menu": "Find the plans that prompts choose from.",
    "adapt": "Make the shortened plans better: bridges, adapters.",
    "label": "Answer and judge the prompts to train, tune and test under every plan; resumes where it stopped.",
    "features": "Read the states of the first layers of every prompt.",
    "tune": "Search the controllers' settings with Optuna; resumes where it stopped.",
    "train": "Train the controllers.",
    "calibrate": "Label what the prices choose, certify one, save the allocator; resumes where it stopped.",
    "evaluate": "Measure all policies on unseen prompts.",
    "report": "Write report.html and log the run to MLflow.",
}


ON_RAY = ("adapt", "features", "calibrate")
"""Stages beside `label` whose work a cluster can do."""


def run(
    config: ConfigFile,
    settings: Settings = None,
    device: Device = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", hidden=True)] = False,
) -> None:
    """Run every stage in order. Skips what is done, resumes what is not, redoes what the settings changed."""
    if dry_run:
        raise InputError("--dry-run is gone; `layerbudget check CONFIG` counts prompts and tokens")
    from pipelines.run.runner import run_all

    loaded = config_of(config, settings, device)
    _answer_try_prompts(run_all(loaded))
    _close(loaded)


def check(config: ConfigFile, settings: Settings = None, device: Device = None) -> None:
    """Say in a second what of a run can be known to fail: model, prompts, judges, splits, certificate, disk."""
    from pipelines.run.check import check_run

    for line in check_run(config_of(config, settings, device)):
        typer.echo(line)


def config_of(path: Path, settings: list[str] | None, device: str | None) -> Config:
    """The configuration that the arguments of a command name."""
    from pipelines.config import load_config

    return load_config(path, [*(settings or []), *([] if device is None else [f"model.device={device!r}"])])


def _answer_try_prompts(workspace: Workspace) -> None:
    from runtime.allocator import Allocator

    config = workspace.config
    if config.try_prompts:
        allocator = Allocator.from_pretrained(config.folder / "allocator")
        if allocator.chat is not None and (wanted := config.data.chat_template) not in ("auto", "never"):
            allocator = allocator.with_chat_template(wanted)
        print_answers(allocator, *workspace.model.loaded, config.try_prompts)


def _close(config: Config) -> None:
    """Print the result of the run from its files."""
    from pipelines.evaluation.summary import closing, load_metrics
    from pipelines.run.run_record import look_at

    typer.echo(closing(load_metrics(config), str(config.folder / "report.html")))
    for line in look_at(config):
        typer.echo(line)


def stage_command(name: str) -> Callable[..., None]:
    """The command of a single stage."""
    if name == "label":
        return label
    if name in ON_RAY:
        return _stage_on_ray(name)

    def stage(config: ConfigFile, settings: Settings = None, device: Device = None) -> None:
        from pipelines.run.runner import run_one

        run_one(config_of(config, settings, device), name)

    return stage


def _stage_on_ray(name: str) -> Callable[..., None]:
    def stage(config: ConfigFile, settings: Settings = None, device: Device = None, ray: Ray = None) -> None:
        from pipelines.run.runner import run_one

        run_one(config_of(config, settings, device), name, ray)

    return stage


def label(
    config: ConfigFile,
    settings: Settings = None,
    device: Device = None,
    ray: Ray = None,
    shard: Annotated[
        str | None,
        typer.Option(metavar="N/OF", help="Label one part only, such as 3/8; other processes may label the others."),
    ] = None,
) -> None:
    from oracle.prompts import Shard
    from pipelines.run.runner import run_one, run_shard

    loaded = config_of(config, settings, device)
    if shard is None:
        run_one(loaded, "label", ray)
    elif ray is not None:
        raise typer.BadParameter("--shard and --ray were both given; with --ray the workers share out all prompts")
    else:
        run_shard(loaded, Shard.parse(shard))


def merge(
    config: ConfigFile,
    stores: Annotated[list[Path], typer.Argument(metavar="STORE...", readable=False, help="labels.db of other runs.")],
    settings: Settings = None,
) -> None:
    """Take over labels that were made elsewhere, for example by `label --shard` on other machines."""
    from pipelines.run.runner import run_merge

    run_merge(config_of(config, settings, None), stores)


def search(
    config: ConfigFile,
    settings: Settings = None,
    device: Device = None,
    searcher: Annotated[str, typer.Option(help="bisection, greedy, mcts, or one of your own.")] = "mcts",
    evaluations: Annotated[int, typer.Option(min=1, help="Plans to try for a prompt, at most.")] = 50,
    split: Annotated[str, typer.Option(help="Split whose prompts are searched.")] = "train",
    prompts: Annotated[int, typer.Option(min=1, help="How many of them, evenly picked.")] = 64,
) -> None:
    """Find the least sufficient plan of single prompts on the model without healing parts; resumes where it stopped."""
    from oracle.prompts import SPLITS
    from pipelines.run.runner import run_search

    if split not in SPLITS:
        raise typer.BadParameter(f"no split {split!r}; there are {', '.join(SPLITS)}")
    run_search(config_of(config, settings, device), searcher, evaluations, split, prompts)
