"""Features of single batches on disk, while others are still being made."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np

from backbone.files import replacing
from controller.features import Features

PART = ".npz"


class FeatureParts:
    """Files `NUMBER.npz` in a folder of one computation's own; each is there as a whole or not at all."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def numbers(self) -> set[int]:
        """The batches whose features are there; those of a damaged file are not."""
        return {int(path.stem) for path in self._folder.glob(f"*{PART}") if _is_whole(path)}

    def add(self, number: int, features: Features) -> None:
        with replacing(self._path(number)) as unfinished, unfinished.open("wb") as file:
            np.savez(file, **features)  # type: ignore[arg-type]

    def all(self) -> list[Features]:
        """By number."""
        found = []
        for number in sorted(self.numbers()):
            with np.load(self._path(number), allow_pickle=False) as saved:
                found.append({name: saved[name] for name in saved.files})
        return found

    def _path(self, number: int) -> Path:
        return self._folder / f"{number}{PART}"


def _is_whole(path: Path) -> bool:
    """Whether a file is an archive whose checksums are right."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (OSError, zipfile.BadZipFile):
        return False
