"""What the machine refuses, such as space on a disk: one sentence, wherever in the code it was met."""

from __future__ import annotations

import errno
import os
import re
import sqlite3
from collections.abc import Iterator

MACHINE = frozenset(
    {
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EFBIG,
        errno.EROFS,
        errno.EACCES,
        errno.EPERM,
        errno.EIO,
        errno.EISDIR,
        errno.ENOTDIR,
        errno.EEXIST,
        errno.ENOTEMPTY,
        errno.ELOOP,
        errno.ENAMETOOLONG,
        errno.EMFILE,
        errno.ENFILE,
        errno.EBUSY,
    }
)
"""Errors of files that no code can mend. A file that is not there is not among them: that is ours to check."""

DATABASE = frozenset(
    {sqlite3.SQLITE_FULL, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_PERM}
)
_WRITTEN = re.compile(r"\[Errno (\d+)\]|\(os error (\d+)\)|errno: (\d+)")
"""How libraries that are not written in Python tell the number of an error of the system."""


def visible(text: str) -> str:
    """A line of text from somebody else for a terminal: control characters as their escapes, such as `\\x1b`."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def sentence_of(error: BaseException) -> str | None:
    """What the machine refused, where that is what `error` comes from; None for any other error."""
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
