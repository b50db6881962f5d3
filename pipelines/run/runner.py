"""Run stages in order: skip what is done, go on with what is not."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from rich.markup import escape

from backbone.files import remove_strays, write_atomically
from backbone.interrupts import safe_place
from oracle.batches import spread
from oracle.labels.store import LabelStore
from oracle.prompts import Shard, Split
from oracle.search import SEARCHERS
from pipelines.config import Config, ConfigError
from pipelines.ray.distributed import workers_at
from pipelines.run.check import check_run
from pipelines.run.model import Loaded
from pipelines.run.progress import console, say
from pipelines.run.state import BY_NAME, LOCK, STAGES, RunState, Stage, all_before
from pipelines.run.workspace import Workspace
from pipelines.search import described, find_least_plans, own_search_folder, write_least_plans
from pipelines.stages import label
from pipelines.verdict import FullRun


def run_all(config: Config, loaded: Loaded | None = None, full: FullRun | None = None) -> Workspace:
    """Run every stage, after the counts of `layerbudget check`; returns the finished run.

    `full` is for a trial: the run that the report's verdict is about.
    Stages whose inputs did not change since they were done are skipped.
    Where all are done nothing is written, so that a finished run may lie in a read-only folder.
    `loaded` is the model and its tokenizer, where they are loaded already.
    """
    workspace = _checked(config, loaded)
    if RunState(workspace).is_done(STAGES[-1]):
        for stage in STAGES:
            _say_done(stage)
        return workspace
    for line in check_run(config, loaded):
        say(line)
    with _own_folder(workspace) as state:
        for stage in STAGES:
            if state.is_done(stage):
                _say_done(stage)
            else:
                _run_stage(workspace, stage, state, **({"full": full} if stage is STAGES[-1] else {}))
    return workspace


def run_one(config: Config, name: str, ray: str | None = None) -> Path:
    """One stage, whether or not it was done before; the stages it follows must be done.

    `ray` is the address of a cluster that does the work of a stage that labels or probes (`pipelines.ray.distributed`).
    """
    workspace = _checked(config)
    with _own_folder(workspace) as state:
        _check_done_before(BY_NAME[name], state)
        with workers_at(ray, config.ray) as workers:
            return _run_stage(workspace, BY_NAME[name], state, **({} if workers is None else {"workers": workers}))


def run_shard(config: Config, shard: Shard) -> Path:
    """Label one part of the prompts; other processes may label other parts of the same run at the same time."""
    workspace = _checked(config)
    with _own_folder(workspace, f"{LOCK}-{shard.number}-of-{shard.of}") as state:
        _check_done_before(BY_NAME["label"], state)
        path = label.run(workspace, shard)
    console.print("When all shards are there, `layerbudget run CONFIG` goes on.")
    return path


def run_merge(config: Config, stores: Sequence[Path]) -> None:
    """Take over the labels that other stores hold, for example those of shards that were made elsewhere.

    Raises:
        StoreError: one of them is no label store; those before it have been taken over.
    """
    with _own_folder(_checked(config)):
        own = LabelStore(config.folder / "labels.db")
        for store in stores:
            say(f"{store}: {own.merge(store)} labels that were not there yet")


def run_search(config: Config, searcher: str, evaluations: int, split: Split, count: int) -> None:
    """The least sufficient plans of some prompts of a split, as a table, a figure and a few lines.

    Raises:
        InputError: an unknown searcher.
        ConfigError: the run has no menu yet, or somebody's own file lies where the results go.
        SearchError: a menu that the searcher cannot search.
    """
    SEARCHERS.checked(searcher)
    workspace = _checked(config)
    with _own_folder(workspace) as state:
        if not state.is_done(BY_NAME["menu"]):
            raise ConfigError("a search needs a menu first: run `layerbudget menu CONFIG`")
        folder = own_search_folder(workspace)
        rows = find_least_plans(workspace, searcher, evaluations, spread(workspace.prompts.splits[split], count))
        for line in described(rows):
            say(line)
        for path in write_least_plans(folder, searcher, rows):
            say(f"  {path}")


def _checked(config: Config, loaded: Loaded | None = None) -> Workspace:
    """The run, after folder and prompts were found fit to use. Nothing is written."""
    workspace = Workspace(config, loaded)
    RunState(workspace)
    workspace.prompts.check_given()
    return workspace


def _say_done(stage: Stage) -> None:
    console.print(f"[green]done before[/]  {stage.name}: {stage.title}")


def _check_done_before(stage: Stage, state: RunState) -> None:
    for earlier in all_before(stage):
        if not state.is_done(earlier):
            raise ConfigError(
                f"the stage {stage.name!r} needs {earlier.name!r} first: run `layerbudget {earlier.name} CONFIG`, "
                "or `layerbudget run CONFIG` for all of them"
            )


@contextmanager
def _own_folder(workspace: Workspace, name: str = LOCK) -> Iterator[RunState]:
    """One process at a time works on a run, or on a shard of its labels; the lock goes with the process."""
    folder = workspace.config.folder
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / name, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        what = folder if name == LOCK else f"this shard of {folder}"
        raise ConfigError(f"another process is working on {what}; wait for it or give this run another name") from None
    try:
        state = RunState(workspace)  # as it is now that nobody else changes it
        state.begin()
        if name == LOCK:
            remove_strays(folder)
        path, text = folder / "config.yaml", workspace.config.dump()
        if not path.is_file() or path.read_bytes() != text.encode():
            write_atomically(path, text)
        yield state
    finally:
        lock.release()


def _run_stage(workspace: Workspace, stage: Stage, state: RunState, **options: Any) -> Path:
    console.print(f"[bold]{stage.name}[/]: {stage.title}")
    start = time.perf_counter()
    path: Path = import_module(f"..stages.{stage.name}", __package__).run(workspace, **options)
    state.record(stage, time.perf_counter() - start)
    safe_place()
    console.print(f"  {escape(str(path))}  [dim]{time.perf_counter() - start:.0f} s[/]")
    return path
