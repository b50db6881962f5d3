"""Files and folders that are there as a whole or not at all."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

UNFINISHED = ".unfinished"
STRAY_SECONDS = 60
"""An unfinished file that nobody has touched for so long was left by a process that was killed."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a new name in the folder of `path` to write a file under, which takes the place of `path` at the end.

    A kill at any moment leaves the old file or the new one; after an error the old one is there. Several processes may
    do so at once: the last one wins.
    """
    handle, name = tempfile.mkstemp(prefix=f".{path.name[:64]}.", suffix=UNFINISHED, dir=path.parent)
    os.close(handle)
    unfinished = Path(name)
    try:
        yield unfinished
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        _give_usual_mode(unfinished)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_atomically(path: Path, text: str) -> None:
    """Replace a file by new text (UTF-8); see `replacing`."""
    with replacing(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8", newline="\n")


@contextmanager
def making_folder(folder: Path) -> Iterator[Path]:
    """Yields an empty folder beside a missing one, whose name it takes at the end.

    An error or a kill leaves no `folder`; what a kill leaves beside is removed by the next attempt. One process at a
    time may do so: see `lock_of`.
    """
    unfinished = folder.with_name(f"{folder.name}{UNFINISHED}")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def remove_strays(folder: Path) -> None:
    """Remove what processes that were killed while `replacing` have left in a folder."""
    for stray in folder.glob(f".*{UNFINISHED}*"):
        if stray.is_file() and time.time() - stray.stat().st_mtime > STRAY_SECONDS:
            stray.unlink(missing_ok=True)


def cache_folder() -> Path:
    """Where layerbudget keeps what it made once: `$LAYERBUDGET_CACHE`, by default `~/.cache/layerbudget`."""
    folder = Path(os.environ.get("LAYERBUDGET_CACHE", "~/.cache/layerbudget")).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def lock_of(path: Path) -> FileLock:
    """A lock for whoever writes to a path on this machine; it lies elsewhere, so that the path's folder stays clean."""
    locks = cache_folder() / "locks"
    locks.mkdir(exist_ok=True)
    return FileLock(locks / f"{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:24]}.lock")


def _give_usual_mode(path: Path) -> None:
    """A temporary file can be read by its owner alone; this one becomes what `open` would have made."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)
