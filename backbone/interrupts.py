"""Ctrl-C on the command line: the first stops at the next safe place, the second at once.

Python's own handler raises KeyboardInterrupt anywhere, also in library code that swallows it. The handler here only
sets a flag. Commands call `safe_place` between batches, trials and stages, which raises if the flag is set. A process
that reaches no safe place within `PATIENCE_S` is ended: files and databases of a run survive an end at any moment.
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
"""Exit status after Ctrl-C; seconds after which a process that reaches no safe place is ended."""
LINE = b"stopped; the same command goes on from here\n"

_line_lock = threading.Lock()
_wakeup, _interrupted, _command_ended = -1, False, False


def install() -> None:
    """Handle Ctrl-C in this process; call from the main thread of a command, never from a library."""
    global _wakeup
    if _wakeup != -1:
        return
    reader, _wakeup = os.pipe()
    os.set_blocking(_wakeup, False)
    signal.signal(signal.SIGINT, _on_sigint)
    signal.set_wakeup_fd(_wakeup, warn_on_full_buffer=False)
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
    threading.Thread(target=_watch, args=(reader,), daemon=True).start()


def safe_place() -> None:
    """Raises KeyboardInterrupt if Ctrl-C was pressed. Call where no work is lost and no library can swallow it."""
    if _interrupted:
        raise KeyboardInterrupt


@contextmanager
def stoppable() -> Iterator[None]:
    """Run a command in this block; after Ctrl-C it raises SystemExit with `INTERRUPTED`, however the block ends."""
    global _command_ended
    try:
        safe_place()
        yield
    except BaseException:
        if not _interrupted:
            raise
    finally:
        _command_ended = True
    if _interrupted:
        raise SystemExit(INTERRUPTED)


@contextmanager
def left_to_a_server() -> Iterator[None]:
    """Leave Ctrl-C in this block to a server's own handler; one that the server raises again at its end counts."""
    before = signal.set_wakeup_fd(-1)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before, warn_on_full_buffer=False)


@contextmanager
def deaf_children() -> Iterator[None]:
    """Processes started in this block ignore Ctrl-C in the terminal; their parent must end them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def say_stopped() -> None:
    """Write `LINE` to standard error, once in a process."""
    if _line_lock.acquire(blocking=False):
        with suppress(OSError):
            os.write(2, LINE)


def _on_sigint(number: int, frame: FrameType | None) -> None:
    global _interrupted
    _interrupted = True
    if _command_ended:
        _exit_now()


def _watch(reader: int) -> None:
    """End the process on a second Ctrl-C or after `PATIENCE_S`; a thread, since native code delays signal handlers."""
    _wait_for_sigint(reader)
    if not _command_ended:
        patience = threading.Timer(PATIENCE_S, _exit_now)
        patience.daemon = True
        patience.start()
        _wait_for_sigint(reader)
    _exit_now()


def _wait_for_sigint(reader: int) -> None:
    while os.read(reader, 1)[0] != signal.SIGINT:
        pass


def _exit_now() -> None:
    """End the process at once, with the processes that it started."""
    say_stopped()
    with suppress(Exception):
        if os.isatty(1):
            os.write(1, b"\x1b[?25h")  # show the cursor, which a progress bar hides
        if (processes := sys.modules.get("multiprocessing.process")) is not None:
            for child in processes.active_children():
                child.kill()
    os._exit(INTERRUPTED)
