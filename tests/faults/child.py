"""Runs one command of the command line in a forked child of a clean process that has everything imported."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import resource
import selectors
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

from pressing import Press

ROOT = Path(__file__).parents[2]
TIME_LIMIT = 600
"""Seconds after which a command hangs; the slowest takes some 20, and ten times that where much else is computed."""
LONGEST_LOOK = 2
"""Seconds between two looks at a command, at most: where more have passed, the machine slept, and that is no hang."""

_starting = threading.Lock()
_IMPORTED = [
    "layerbudget.cli",
    "pipelines.run.runner",
    "pipelines.stages.menu",
    "pipelines.stages.adapt",
    "pipelines.stages.label",
    "pipelines.stages.features",
    "pipelines.stages.tune",
    "pipelines.stages.train",
    "pipelines.stages.calibrate",
    "pipelines.stages.evaluate",
    "pipelines.stages.report",
    "runtime.answer_files",
    "runtime.saving.allocator_files",
    "datasets",
    "lightgbm",
    "mapie.risk_control",
    "mlflow",
    "mlflow.store.tracking.sqlalchemy_store",
    "sklearn.decomposition",
]
"""Whatever a run imports, early or late, so that no forked child imports it again."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a child may not do.

    Attributes:
        file_bytes: no file may grow beyond this; None for no limit.
        obeys_modes: also root is refused what the modes of files and folders refuse.
        interrupt_at: press Ctrl-C once this text was printed.
        interrupt_after: seconds from that text to Ctrl-C.
        interrupt_with: another signal in its place.
        press: signals that it sends to itself.
        sync_seconds: how long it takes to bring a file to the disk.
    """

    file_bytes: int | None = None
    obeys_modes: bool = False
    interrupt_at: str | None = None
    interrupt_after: float = 0.0
    interrupt_with: signal.Signals = signal.SIGINT
    press: Press | None = None
    sync_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Ended:
    """How a command ended: its status, None for one that hung and was killed, negative for a death by a signal."""

    status: int | None
    out: str
    err: str


def command(folder: Path, *arguments: object, limits: Limits | None = None) -> Ended:
    """`layerbudget ARGUMENTS` in a folder."""
    limits = limits or Limits()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTED)
    (out, to_out), (err, to_err) = context.Pipe(duplex=False), context.Pipe(duplex=False)
    words = [str(argument) for argument in arguments]
    child = context.Process(target=_run, args=(folder, words, limits, to_out, to_err), daemon=True)
    with _starting, _environment():
        child.start()
    to_out.close()
    to_err.close()
    texts = _listened(child, [out, err], limits)
    child.join(5)
    status = child.exitcode
    if status is None:
        child.kill()
        child.join()
    child.close()
    return Ended(status, *(text.decode(errors="replace") for text in texts))


@contextmanager
def _environment() -> Iterator[None]:
    """The forked processes have the environment that their server was started with."""
    before = dict(os.environ)
    os.environ.update({"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "200"})
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _listened(child: BaseProcess, pipes: Sequence[Connection], limits: Limits) -> list[bytes]:
    """What the child writes, until it ends or its time is over."""
    texts = dict.fromkeys(pipes, b"")
    left, last = float(TIME_LIMIT), time.monotonic()
    interrupt, interrupt_with = float("inf"), limits.interrupt_with
    with selectors.DefaultSelector() as selector:
        for pipe in pipes:
            selector.register(pipe, selectors.EVENT_READ)
        while selector.get_map() and left > 0:
            now = time.monotonic()
            left, last = left - min(now - last, LONGEST_LOOK), now
            if now >= interrupt:
                assert child.pid is not None
                os.kill(child.pid, interrupt_with)
                interrupt = float("inf")
            for key, _ in selector.select(max(0.0, min(interrupt, now + 1) - now)):
                if chunk := os.read(key.fd, 65536):
                    texts[key.fileobj] += chunk  # type: ignore[index]
                else:
                    selector.unregister(key.fileobj)
            wanted = limits.interrupt_at
            if wanted is not None and wanted.encode() in texts[pipes[0]]:
                interrupt, limits = time.monotonic() + limits.interrupt_after, Limits()
    for pipe in pipes:
        pipe.close()
    return list(texts.values())


def _run(folder: Path, words: list[str], limits: Limits, out: Connection, err: Connection) -> None:
    os.dup2(out.fileno(), 1)
    os.dup2(err.fileno(), 2)
    out.close()
    err.close()
    sys.stdout, sys.stderr = (open(number, "w", encoding="utf-8", closefd=False) for number in (1, 2))  # noqa: SIM115
    os.chdir(folder)
    sys.argv = ["layerbudget", *words]
    if limits.file_bytes is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limits.file_bytes, limits.file_bytes))
    if limits.obeys_modes:
        _drop_capabilities()
    if limits.sync_seconds:
        _slow_down_sync(limits.sync_seconds)
    from layerbudget.__main__ import main

    if limits.press is not None:
        limits.press.install()
    main()


def _slow_down_sync(seconds: float) -> None:
    sync = os.fsync

    def slowly(file: int) -> None:
        time.sleep(seconds)
        sync(file)

    os.fsync = slowly


def _drop_capabilities() -> None:
    """Root reads and writes whatever the modes say, unless it gives its capabilities up."""
    library = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    if os.geteuid() == 0 and library.capset(header, (ctypes.c_uint32 * 6)()) != 0:
        raise OSError(ctypes.get_errno(), "capset")
