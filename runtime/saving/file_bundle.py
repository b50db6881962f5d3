"""Files that lie in a folder beside others and change as a whole, whoever reads meanwhile and whenever a writer dies.

A manifest lists them with their SHA-256. A writer puts the new files into a hidden folder, gives that its final name,
which is the moment from which they count, and then moves them to their places, the manifest last. A reader takes each
file from where its SHA-256 says it is; if something does not fit and the manifest has changed meanwhile, it starts
over. Each manifest has an identifier of its own: the same files saved again are a change too.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from backbone.errors import ArtefactError
from backbone.files import lock_of
from backbone.strict_json import parse

MANIFEST, CARD = "manifest.json", "README.md"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
"""What a file may be called: so a manifest, which may come from anybody, names nothing outside of its folder."""
_SCRATCH, _REPLACEMENT = ".layerbudget-saving", ".layerbudget-replacement"
ATTEMPTS, PAUSE_S = 200, 0.01
"""How often a reader starts over while others save, and how long it waits before. What fails under a manifest that has
not changed meanwhile is damaged: a file is always in one of its two places."""
LARGEST = {".json": 2**20, ".md": 2**20, ".safetensors": 2**36}
"""Bytes of a file by its suffix."""

T = TypeVar("T")
Manifest = dict[str, Any]


def digest_of(manifest: Manifest) -> str:
    """What the manifest itself is checked by."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def save_bundle(folder: Path, write: Callable[[Path], Manifest]) -> None:
    """Put files into a folder, in the place of those that were saved there before; other files stay as they are.

    Args:
        folder: made where it is missing.
        write: writes the files into an empty folder and returns what the manifest says beside "files".

    Raises:
        ArtefactError: the folder is a file, or somebody else's file, or an edited model card, is in the way.
    """
    folder = folder.expanduser()
    if folder.exists() and not folder.is_dir():
        raise ArtefactError(f"cannot save to {folder}: it is a file, and a folder is needed")
    folder.mkdir(parents=True, exist_ok=True)
    with lock_of(folder):
        _tidy(folder)
        scratch = folder / _SCRATCH
        scratch.mkdir()
        try:
            _fill(scratch, write)
            _check_free(folder, scratch)
            scratch.rename(folder / _REPLACEMENT)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        _install(folder)


def read_bundle(folder: Path, load: Callable[[Path, Manifest], T]) -> T:
    """What `load` makes of the files, which it finds in the folder it is given, and of the manifest.

    Raises:
        ArtefactError: there are none, or they are not the ones that were saved; whatever `load` raises.
    """
    for _ in range(ATTEMPTS):
        content = _manifest(folder)
        try:
            manifest = _parsed(folder, content)
            with _together(folder, manifest) as place:
                loaded = load(place, manifest)
            if _manifest(folder) == content:
                return loaded
        except Exception:
            if _manifest(folder) == content:
                raise
        time.sleep(PAUSE_S)
    raise ArtefactError(f"{folder} was saved to again and again while it was read; try again when that is over")


def file_hash(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fill(scratch: Path, write: Callable[[Path], Manifest]) -> None:
    described = write(scratch)
    files = {path.name: file_hash(path) for path in sorted(scratch.iterdir())}
    manifest = {**described, "save_id": uuid.uuid4().hex, "files": files}
    text = json.dumps({**manifest, "digest": digest_of(manifest)}, indent=2) + "\n"
    (scratch / MANIFEST).write_text(text, encoding="utf-8")
    for path in scratch.iterdir():
        _check_size(path)
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _check_free(folder: Path, scratch: Path) -> None:
    """Raises ArtefactError where a new file would replace one that is not ours."""
    own = _own_files(folder)
    for path in sorted(scratch.iterdir()):
        target = folder / path.name
        if path.name not in own and (target.exists() or target.is_symlink()):
            raise ArtefactError(
                f"cannot save to {folder}: its {path.name} was not saved by layerbudget, or has been changed since; "
                "move it away, or choose another folder"
            )


def _own_files(folder: Path) -> set[str]:
    """The files that were saved there before: the manifest, if its digest shows it to be ours, and what it lists.

    A card that is no longer as it was saved is not among them: people and other libraries write these too.
    """
    try:
        files = _parsed(folder, _content(folder / MANIFEST, folder))["files"]
    except ArtefactError:
        return set()
    card = folder / CARD
    changed = CARD in files and card.is_file() and file_hash(card) != files[CARD]
    return {MANIFEST, *files} - ({CARD} if changed else set())


def _tidy(folder: Path) -> None:
    """Finish or discard what a writer that was killed has left; a link is somebody else's doing, and not followed."""
    for name in (_SCRATCH, _REPLACEMENT):
        if (folder / name).is_symlink():
            (folder / name).unlink()
    shutil.rmtree(folder / _SCRATCH, ignore_errors=True)
    _install(folder)


def _install(folder: Path) -> None:
    """Move the files of a complete replacement to their places; readers take them from either."""
    replacement = folder / _REPLACEMENT
    try:
        files = _parsed(replacement, _content(replacement / MANIFEST, folder))["files"]
    except ArtefactError:
        shutil.rmtree(replacement, ignore_errors=True)
        return
    for name in files:
        if (replacement / name).exists():
            (replacement / name).replace(folder / name)
    for name in _own_files(folder) - {MANIFEST, *files}:
        (folder / name).unlink(missing_ok=True)
    (replacement / MANIFEST).replace(folder / MANIFEST)
    shutil.rmtree(replacement, ignore_errors=True)


def _manifest(folder: Path) -> bytes:
    return next(filter(None, (_content(path, folder) for path in _places(folder, MANIFEST))), b"")


def _places(folder: Path, name: str) -> tuple[Path, Path]:
    """Where a file lies: in a replacement whose files are being moved, or at its place."""
    return folder / _REPLACEMENT / name, folder / name


def _content(path: Path, folder: Path) -> bytes:
    return _read(path, folder, Path.read_bytes) or b""


def _read(path: Path, folder: Path, read: Callable[[Path], T]) -> T | None:
    """What `read` gives of a file; None if the file is missing, or something without an end, such as a pipe."""
    try:
        if not path.is_file():
            return None
        _check_is_own(path, folder)
        return read(path)
    except (FileNotFoundError, NotADirectoryError):  # moved just now
        return None
    except OSError as error:
        raise ArtefactError(f"{path} cannot be read: {error.strerror}") from None


def _parsed(folder: Path, content: bytes) -> Manifest:
    """A manifest that its digest shows to be whole, with names of files in its own folder only."""
    if not content:
        raise ArtefactError(f"{folder} holds no allocator: there is no {MANIFEST}")
    try:
        manifest: Manifest = parse(content.decode())
        digest = manifest.pop("digest")
        fits = digest == digest_of(manifest)
        files = manifest["files"]
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise ArtefactError(f"{folder / MANIFEST} is damaged: it is not the manifest that was saved") from None
    if not fits:
        raise ArtefactError(f"{folder / MANIFEST} is damaged: its content does not match its digest")
    if not isinstance(files, dict) or not all(isinstance(known, str) for known in files.values()):
        raise ArtefactError(f"{folder / MANIFEST} is damaged: files should hold names and SHA-256")
    for name in files:
        if name == MANIFEST or not NAME.fullmatch(name):
            raise ArtefactError(f"{folder / MANIFEST} is damaged: {name!r:.80} is not the name of a file in its folder")
    return manifest


@contextmanager
def _together(folder: Path, manifest: Manifest) -> Iterator[Path]:
    """A folder with all files as they were saved: `folder` itself, or, while they are being moved, copies."""
    places = {name: _place(folder, name, known) for name, known in manifest["files"].items()}
    if all(place.parent == folder for place in places.values()):
        yield folder
        return
    with tempfile.TemporaryDirectory() as copies:
        for name, place in places.items():
            try:
                shutil.copyfile(place, Path(copies) / name)
            except FileNotFoundError:  # moved just now
                shutil.copyfile(folder / name, Path(copies) / name)
        yield Path(copies)


def _place(folder: Path, name: str, known: str) -> Path:
    is_there = False
    for path in _places(folder, name):
        if (found := _read(path, folder, file_hash)) == known:
            return path
        is_there |= found is not None
    what = f"does not match its SHA-256 in {MANIFEST}" if is_there else "is missing"
    raise ArtefactError(f"{folder} is damaged: {name} {what}")


def _check_is_own(path: Path, folder: Path) -> None:
    """Raises ArtefactError for a file that is too large, or a link to one outside of the folder.

    The hub's cache keeps a repository's files in `blobs`, and links to them in `snapshots/REVISION`.
    """
    _check_size(path)
    home, real = folder.resolve(), path.resolve()
    caches = [place.parent.parent / "blobs" for place in (home, *home.parents) if place.parent.name == "snapshots"]
    if not any(real.is_relative_to(place) for place in (home, *caches)):
        raise ArtefactError(f"{path} is a link to {real}, outside of its folder; put the file itself there")
    status = real.stat()
    with os.scandir(real.parent) as entries:
        names = sum(entry.inode() == status.st_ino for entry in entries) if status.st_nlink > 1 else 1
    if names < status.st_nlink:
        raise ArtefactError(f"{path} is a hard link to a file outside of its folder; put a copy of the file there")


def _check_size(path: Path) -> None:
    largest, size = LARGEST.get(path.suffix, LARGEST[".safetensors"]), path.stat().st_size
    if size > largest:
        raise ArtefactError(f"{path} has {size} bytes; such a file has at most {largest}")
