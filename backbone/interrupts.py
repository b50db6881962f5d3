"""Ctrl-C on the command line: the first one stops at the next safe place, the second one at once.

Python's own handler raises KeyboardInterrupt anywhere, also where a library drops or logs it. The handler here raises
nothing. Work asks at its safe places, between batches, trials and stages. Where none is reached within `PATIENCE_S` the
process ends all the same: every file and database of a run survives that at any moment.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

INTERRUPTED, PATIENCE_S = 130, 5.0
"""Exit status after Ctrl-C; seconds from the first one to the end of a process that reaches no safe place."""
LINE = b"stopped; the same command goes on from here\n"

_unsaid = threading.Lock()
_wakeup, _asked, _is_over = -1, False, False


def install() -> None:
    """Take Ctrl-C over for this process, in its main thread. For commands, never for a library."""
    global _wakeup
    if _wakeup != -1:
        return
    reader, _wakeup = os.pipe()
    os.set_blocking(_wakeup, False)
    signal.signal(signal.SIGINT, _note)
    signal.set_wakeup_fd(_wakeup, warn_on_full_buffer=False)
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
    threading.Thread(target=_watch, args=(reader,), daemon=True).start()


def safe_place() -> None:
    """Raises KeyboardInterrupt if Ctrl-C was pressed: nothing is lost here, and no library swallows the exception."""
    if _asked:
        raise KeyboardInterrupt


@contextmanager
def stoppable() -> Iterator[None]:
    """Raises SystemExit with `INTERRUPTED` after Ctrl-C, however the command in it ends."""
    global _is_over
    try:
        safe_place()
        yield
    except BaseException:
        if not _asked:
            raise
    finally:
        _is_over = True
    if _asked:
        raise SystemExit(INTERRUPTED)


@contextmanager
def left_to_a_server() -> Iterator[None]:
    """The server in it has a handler of its own; a Ctrl-C that it raises again at its end counts afterwards."""
    before = signal.set_wakeup_fd(-1)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before, warn_on_full_buffer=False)


@contextmanager
def deaf_children() -> Iterator[None]:
    """Processes started in it do not hear the Ctrl-C of their terminal; whoever started them ends them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def say_stopped() -> None:
    """The one line on the standard error, once."""
    if _unsaid.acquire(blocking=False):
        with suppress(OSError):
            os.write(2, LINE)


def _note(number: int, frame: FrameType | None) -> None:
    global _asked
    _asked = True
    if _is_over:
        _end()


def _watch(reader: int) -> None:
    """Waits in a thread of its own: Python calls a handler only once the main thread is back from native code."""
    _await(reader)
    if not _is_over:
        patience = threading.Timer(PATIENCE_S, _end)
        patience.daemon = True
        patience.start()
        _await(reader)
    _end()


def _await(reader: int) -> None:
    while os.read(reader, 1)[0] != signal.SIGINT:
        pass


def _end() -> None:
    """End the process here and now, with the processes that it started."""
    say_stopped()
    with suppress(Exception):
        if os.isatty(1):
            os.write(1, b"\x1b[?25h")  # a bar hides the cursor
        if (processes := sys.modules.get("multiprocessing.process")) is not None:
            for child in processes.active_children():
                child.kill()
    os._exit(INTERRUPTED)
