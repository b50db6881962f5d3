"""Run stages in order: skip what is done, go on with what is not."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

from filelock import FileLock, Timeout

from oracle.prompts import Shard
from pipelines import label
from pipelines.config import Config, ConfigError
from pipelines.progress import console
from pipelines.stages import BY_NAME, STAGES, RunState, Stage, write_atomically
from pipelines.workspace import Workspace


def run_all(config: Config) -> None:
    """Every stage of a run; those whose inputs did not change since they were done are skipped."""
    with _own_folder(config):
        state = _begin(config)
        for stage in STAGES:
            if state.is_done(stage):
                console.print(f"[green]done before[/]  {stage.name}: {stage.title}")
            else:
                _run_stage(config, stage, state)


def run_one(config: Config, name: str) -> Path:
    """One stage, whether or not it was done before; the stages it follows must be done."""
    with _own_folder(config):
        state, stage = _begin(config), BY_NAME[name]
        _check_done_before(stage, state)
        return _run_stage(config, stage, state)


def run_shard(config: Config, shard: Shard) -> Path:
    """Label one part of the prompts; other processes may label other parts of the same run at the same time."""
    with _own_folder(config, f".lock-{shard.number}-of-{shard.of}"):
        _check_done_before(BY_NAME["label"], _begin(config))
        path = label.run(config, shard)
    console.print("When all shards are there, `layerbudget run CONFIG` goes on.")
    return path


def _check_done_before(stage: Stage, state: RunState) -> None:
    for earlier in _all_before(stage):
        if not state.is_done(earlier):
            raise ConfigError(
                f"the stage {stage.name!r} needs {earlier.name!r} first: run `layerbudget {earlier.name} CONFIG`, "
                "or `layerbudget run CONFIG` for all of them"
            )


@contextmanager
def _own_folder(config: Config, name: str = ".lock") -> Iterator[None]:
    """One process at a time works on a run, or on a shard of its labels; the lock goes with the process."""
    config.folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(config.folder / name, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        what = config.folder if name == ".lock" else f"this shard of {config.folder}"
        raise ConfigError(f"another process is working on {what}; wait for it or give this run another name") from None
    try:
        yield
    finally:
        lock.release()


def _begin(config: Config) -> RunState:
    Workspace.forget()
    state = RunState(config)
    _ = Workspace.of(config).splits  # wrong prompts are refused before anything is written
    write_atomically(config.folder / "config.yaml", config.dump())
    return state


def _run_stage(config: Config, stage: Stage, state: RunState) -> Path:
    console.print(f"[bold]{stage.name}[/]: {stage.title}")
    start = time.perf_counter()
    run: Callable[[Config], Path] = import_module(f"pipelines.{stage.name}").run
    path = run(config)
    state.record(stage, time.perf_counter() - start)
    console.print(f"  {path}  [dim]{time.perf_counter() - start:.0f} s[/]")
    return path


def _all_before(stage: Stage) -> list[Stage]:
    names = set(stage.follows)
    for name in stage.follows:
        names |= {earlier.name for earlier in _all_before(BY_NAME[name])}
    return [candidate for candidate in STAGES if candidate.name in names]
