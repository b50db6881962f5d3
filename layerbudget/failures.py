"""Failures of the machine, such as a full disk, as one sentence."""

from __future__ import annotations

import errno
import os
import re
import sqlite3
from collections.abc import Iterator

_NUMBERS = "NOSPC DQUOT FBIG ROFS ACCES PERM IO ISDIR NOTDIR EXIST NOTEMPTY LOOP NAMETOOLONG MFILE NFILE BUSY"
MACHINE = frozenset(getattr(errno, f"E{name}") for name in _NUMBERS.split())
"""Errors of files that only the user can put right. ENOENT is left out: the code checks for missing files."""

DATABASE = frozenset(
    {sqlite3.SQLITE_FULL, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_PERM}
)
_ERRNO_IN_TEXT = re.compile(r"\[Errno (\d+)\]|\(os error (\d+)\)|errno: (\d+)")
"""Error numbers in the messages of libraries that are not written in Python."""


def visible(text: str) -> str:
    """Escape the control characters of a text, such as `\\x1b`, before a terminal shows it."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def sentence_of(error: BaseException) -> str | None:
    """One sentence about the failure of the machine that caused an error; None where there was none."""
    for cause in _chain(error):
        if reason := _reason(cause):
            return f"{reason}; once that is put right, the same command goes on from here"
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what a traceback shows for its causes, each once: `raise ... from` can make circles."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _reason(error: BaseException) -> str | None:
    if isinstance(error, sqlite3.Error):
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        return f"cannot use a database of this run: {error}" if code in DATABASE else None
    written = _ERRNO_IN_TEXT.search(str(error))
    number = getattr(error, "errno", None) or (int(next(filter(None, written.groups()))) if written else 0)
    if number not in MACHINE:
        return None
    name = getattr(error, "filename2", None) or getattr(error, "filename", None)
    place = f"cannot use {name}" if name else "cannot read or write a file"
    return f"{place}: {os.strerror(number).lower()}"
