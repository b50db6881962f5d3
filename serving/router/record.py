"""A share of the prompts that are served, kept in a file that `layerbudget certify` reads."""

from __future__ import annotations

import errno
import logging
import os
import queue
import random
import stat
import threading
from collections.abc import Mapping, Sequence
from io import FileIO
from pathlib import Path
from typing import Any

from filelock import Timeout

from backbone.errors import InputError
from backbone.files import lock_of
from serving.router.requests import encoded

logger = logging.getLogger(__name__)

RECORD_BYTES = 100 * 2**20
"""A record grows no larger."""
MOST_WAITING = 1000
"""Prompts that wait for a slow disk; those beyond are not recorded."""
JUDGE = {"judge": "agreement"}
"""Compares with the full model's own answer, since a request has no reference."""
LINE_START = encoded(JUDGE)[:-1] + b","
END_S = 5.0


class PromptRecord:
    """Appends a random share of prompts to a JSONL file, in a thread of its own.

    It holds whole lines: half a line that a full disk or a killed process leaves is removed. A failure to write is
    logged once, and recording goes on when the file can be written again. A removed file is not made anew.

    Args:
        path: ends in `.jsonl`; made with mode 0600 where it is missing, else appended to.
        share: probability in [0, 1] with which each prompt is recorded.

    Raises:
        InputError: a share or path that cannot be; a file that is no record; another process records there.
        OSError: the file cannot be made or written.
    """

    def __init__(self, path: Path, share: float) -> None:
        if not 0 <= share <= 1:
            raise InputError(f"--share should be a number from 0 to 1, got {share:g}")
        self.path, self.share = path.expanduser().absolute(), share
        _check_path(self.path)
        self._lock = lock_of(self.path)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise InputError(f"another process records to {path}; name another file") from None
        try:
            os.close(os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600))
            self._append(b"")
        except (OSError, InputError):
            self._lock.release()
            raise
        self._draw, self._fails = random.Random(), False
        self._lines: queue.Queue[bytes | None] = queue.Queue(MOST_WAITING)
        self._thread = threading.Thread(target=self._write, name="layerbudget-record", daemon=True)
        self._thread.start()

    @property
    def sentence(self) -> str:
        """What is stored and where, for the operator."""
        mode = stat.S_IMODE(self.path.stat().st_mode)
        return (
            f"records each prompt with probability {self.share:.3g} in {self.path} (mode {mode:04o}, at most "
            f"{RECORD_BYTES >> 20} MiB): texts and turns as clients send them, without answers, keys or addresses"
        )

    def offer(self, prompts: Sequence[Any]) -> None:
        """Draw from a request's prompts: texts to be continued, or conversations. Token lists are left out."""
        for prompt in prompts:
            if self._draw.random() < self.share and (row := _row(prompt)):
                try:
                    self._lines.put_nowait(encoded({**JUDGE, **row}) + b"\n")
                except queue.Full:
                    return

    def close(self) -> None:
        """Write what waits, for some seconds at most."""
        try:
            self._lines.put(None, timeout=END_S)
        except queue.Full:
            return
        self._thread.join(END_S)
        self._lock.release()

    def _write(self) -> None:
        while (line := self._lines.get()) is not None:
            try:
                self._append(line)
                self._fails = False
            except (OSError, InputError) as error:
                if not self._fails:
                    reason = getattr(error, "strerror", None) or error
                    logger.warning("prompts are not recorded in %s: %s; requests go on", self.path, reason)
                self._fails = True

    def _append(self, line: bytes) -> None:
        with FileIO(self.path, "r+", opener=_appending) as file:  # raises where the file was removed
            size = _whole_lines(file, self.path)
            if size + len(line) > RECORD_BYTES:
                raise OSError(errno.EFBIG, f"it has its full size of {RECORD_BYTES >> 20} MiB", str(self.path))
            try:
                written = file.write(line)
            except OSError:
                file.truncate(size)
                raise
            if written != len(line):
                file.truncate(size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _appending(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_APPEND)


def _check_path(path: Path) -> None:
    if path.suffix != ".jsonl":
        raise InputError(f"--record {path} should end in .jsonl")
    if not path.parent.is_dir():
        raise InputError(f"the folder of --record {path} is missing; make it first")
    if path.exists() and not path.is_file():
        raise InputError(f"--record {path} is {'a folder' if path.is_dir() else 'no regular file'}; name a file")


def _row(prompt: Any) -> Mapping[str, Any] | None:
    """The prompt as a row of a file of prompts."""
    if isinstance(prompt, str):
        return {"prompt": prompt, "raw": True}
    if isinstance(prompt[0], Mapping):
        return {"messages": [{name: turn[name] for name in ("role", "content")} for turn in prompt]}
    return None


def _whole_lines(file: FileIO, path: Path) -> int:
    """Size of a record, after removing half a line at its end. Raises InputError for a file that is no record."""
    size = file.seek(0, os.SEEK_END)
    if not size:
        return 0
    file.seek(size - 1)
    if file.read(1) == b"\n":
        return size
    file.seek(max(0, size - RECORD_BYTES))
    half = file.read().rpartition(b"\n")[2]
    if not half.startswith(LINE_START[: len(half)]):
        raise InputError(f"{path} ends in half a line that is no recorded prompt; name another file")
    return file.truncate(size - len(half))
