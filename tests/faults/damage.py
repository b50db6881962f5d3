"""Ways to damage a file, whatever it holds."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.numpy import save_file

Damage = Callable[[Path], None]

DEEP = 100_000
"""Brackets inside one another: a parser that calls itself for each runs out of stack."""


def content(change: Callable[[bytes], bytes]) -> Damage:
    """Another content, made of the old one."""

    def damage(path: Path) -> None:
        path.write_bytes(change(path.read_bytes()))

    return damage


def in_the_middle(added: bytes) -> Damage:
    return content(lambda old: old[: len(old) // 2] + added + old[len(old) // 2 :])


def bits_flipped(seed: int) -> Damage:
    """Flips one bit in each of eight places."""

    def flip(old: bytes) -> bytes:
        new, draw = bytearray(old), random.Random(seed)
        for _ in range(8):
            new[draw.randrange(len(new))] ^= 1 << draw.randrange(8)
        return bytes(new)

    return content(flip)


def folder_in_its_place(path: Path) -> None:
    path.unlink()
    path.mkdir()
    (path / "notes.txt").write_text("What somebody else keeps here.\n")


def link_to_itself(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def tensors(change: Callable[[dict[str, Any]], dict[str, Any]], with_metadata: bool = True) -> Damage:
    """Other tensors, made of the old ones in the order of their names."""

    def damage(path: Path) -> None:
        with safe_open(path, "numpy") as file:
            metadata, arrays = file.metadata(), {name: file.get_tensor(name) for name in sorted(file.keys())}
        save_file(change(arrays), path, metadata if with_metadata else None)

    return damage


def each_tensor(change: Callable[[Any], Any]) -> Damage:
    return tensors(lambda arrays: {name: change(array) for name, array in arrays.items()})


ANY: dict[str, Damage] = {
    "missing": Path.unlink,
    "empty": content(lambda old: b""),
    "truncated": content(lambda old: old[: len(old) // 2]),
    "last byte gone": content(lambda old: old.rstrip()[:-1]),
    "garbage first": content(lambda old: random.Random(0).randbytes(64) + old[64:]),
    "garbage behind": content(lambda old: old + random.Random(1).randbytes(64)),
    "bits flipped 1": bits_flipped(1),
    "bits flipped 2": bits_flipped(2),
    "bits flipped 3": bits_flipped(3),
    "zeros": content(lambda old: bytes(len(old))),  # what some file systems leave after a power cut
    "a folder": folder_in_its_place,
    "a link to itself": link_to_itself,
    "unreadable": lambda path: path.chmod(0),
}
TEXT: dict[str, Damage] = {
    "not UTF-8": in_the_middle(b"\xff\xfe\xe9"),
    "UTF-16": content(lambda old: old.decode().encode("utf-16")),
    "NUL bytes": in_the_middle(bytes(8)),
}
JSON: dict[str, Damage] = {
    "deep": content(lambda old: b"[" * DEEP + b"]" * DEEP),
    "a list": content(lambda old: b"[]\n"),
    "no keys": content(lambda old: b"{}\n"),
    "a huge number": content(lambda old: b"9" * 5000 + b"\n"),
}
TENSORS: dict[str, Damage] = {
    "no tensors": lambda path: save_file({}, path),
    "one tensor missing": tensors(lambda arrays: dict(list(arrays.items())[1:])),
    "not a number": each_tensor(lambda array: array * float("nan")),
    "another shape": each_tensor(lambda array: array.reshape(-1)[:1]),
    "no metadata": tensors(lambda arrays: arrays, with_metadata=False),
}


def damages_of(name: str) -> dict[str, Damage]:
    """What can happen to a file of this name."""
    suffix = Path(name).suffix
    found = dict(ANY)
    if suffix in (".json", ".jsonl", ".yaml", ".txt", ".md", ".html"):
        found |= TEXT
    if suffix in (".json", ".jsonl", ".yaml"):
        found |= JSON
    if suffix == ".safetensors":
        found |= TENSORS
    return found
