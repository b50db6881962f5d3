"""Failures of the machine, such as a full disk, as one sentence."""

from __future__ import annotations

import errno
import os
import re
import sqlite3
from collections.abc import Iterator

_NUMBERS = "NOSPC DQUOT FBIG ROFS ACCES PERM IO ISDIR NOTDIR EXIST NOTEMPTY LOOP NAMETOOLONG MFILE NFILE BUSY"
MACHINE = frozenset(getattr(errno, f"E{name}") for name in _NUMBERS.split())
"""Errors of files that no code can mend. A missing file is not among them: the code checks for it."""

DATABASE = frozenset(
    {sqlite3.SQLITE_FULL, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_PERM}
)
_WRITTEN = re.compile(r"\[Errno (\d+)\]|\(os error (\d+)\)|errno: (\d+)")
"""Error numbers in the messages of libraries that are not written in Python."""


def visible(text: str) -> str:
    """Foreign text for a terminal, control characters escaped, such as `\\x1b`."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def sentence_of(error: BaseException) -> str | None:
    """A sentence for an error that comes from a failure of the machine; None for any other error."""
    for cause in _chain(error):
        if reason := _reason(cause):
            return f"{reason}; once that is put right, the same command goes on from here"
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _reason(error: BaseException) -> str | None:
    if isinstance(error, sqlite3.Error):
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        return f"cannot use a database of this run: {error}" if code in DATABASE else None
    written = _WRITTEN.search(str(error))
    number = getattr(error, "errno", None) or (int(next(filter(None, written.groups()))) if written else 0)
    if number not in MACHINE:
        return None
    name = getattr(error, "filename2", None) or getattr(error, "filename", None)
    place = f"cannot use {name}" if name else "cannot read or write a file"
    return f"{place}: {os.strerror(number).lower()}"
