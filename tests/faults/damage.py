"""Ways to damage a file, whatever it holds."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

from safetensors import safe_open
from safetensors.numpy import save_file

Damage = Callable[[Path], None]

DEEP = 100_000
"""Brackets inside one another: a parser that calls itself for each runs out of stack."""


def missing(path: Path) -> None:
    path.unlink()


def empty(path: Path) -> None:
    path.write_bytes(b"")


def truncated(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def last_byte_gone(path: Path) -> None:
    content = path.read_bytes().rstrip()
    path.write_bytes(content[:-1])


def garbage_first(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(random.Random(0).randbytes(64) + content[64:])


def garbage_behind(path: Path) -> None:
    path.write_bytes(path.read_bytes() + random.Random(1).randbytes(64))


def bits_flipped(seed: int) -> Damage:
    """Flips one bit in each of eight places."""

    def damage(path: Path) -> None:
        content, draw = bytearray(path.read_bytes()), random.Random(seed)
        for _ in range(8):
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(content)

    return damage


def zeros(path: Path) -> None:
    """What some file systems leave after a power cut."""
    path.write_bytes(bytes(path.stat().st_size))


def folder_in_its_place(path: Path) -> None:
    path.unlink()
    path.mkdir()
    (path / "notes.txt").write_text("What somebody else keeps here.\n")


def link_to_itself(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def unreadable(path: Path) -> None:
    path.chmod(0)


def not_utf8(path: Path) -> None:
    content = path.read_bytes()
    middle = len(content) // 2
    path.write_bytes(content[:middle] + b"\xff\xfe\xe9" + content[middle:])


def utf16(path: Path) -> None:
    path.write_bytes(path.read_text().encode("utf-16"))


def nul_bytes(path: Path) -> None:
    content = path.read_bytes()
    middle = len(content) // 2
    path.write_bytes(content[:middle] + bytes(8) + content[middle:])


def deep(path: Path) -> None:
    path.write_text("[" * DEEP + "]" * DEEP)


def a_list(path: Path) -> None:
    path.write_text("[]\n")


def no_keys(path: Path) -> None:
    path.write_text("{}\n")


def a_huge_number(path: Path) -> None:
    path.write_text("9" * 5000 + "\n")


def no_tensors(path: Path) -> None:
    save_file({}, path)


def one_tensor_missing(path: Path) -> None:
    """Keeps the metadata, so that only the tensor is not as it should be."""
    with safe_open(path, "numpy") as file:
        names = sorted(file.keys())
        metadata, kept = file.metadata(), {name: file.get_tensor(name) for name in names[1:]}
    save_file(kept, path, metadata)


def tensors_not_a_number(path: Path) -> None:
    with safe_open(path, "numpy") as file:
        metadata, arrays = file.metadata(), {name: file.get_tensor(name) for name in sorted(file.keys())}
    save_file({name: array * float("nan") for name, array in arrays.items()}, path, metadata)


def tensors_of_another_shape(path: Path) -> None:
    with safe_open(path, "numpy") as file:
        metadata, arrays = file.metadata(), {name: file.get_tensor(name) for name in sorted(file.keys())}
    save_file({name: array.reshape(-1)[:1] for name, array in arrays.items()}, path, metadata)


def no_metadata(path: Path) -> None:
    with safe_open(path, "numpy") as file:
        arrays = {name: file.get_tensor(name) for name in sorted(file.keys())}
    save_file(arrays, path)


ANY: dict[str, Damage] = {
    "missing": missing,
    "empty": empty,
    "truncated": truncated,
    "last byte gone": last_byte_gone,
    "garbage first": garbage_first,
    "garbage behind": garbage_behind,
    "bits flipped 1": bits_flipped(1),
    "bits flipped 2": bits_flipped(2),
    "bits flipped 3": bits_flipped(3),
    "zeros": zeros,
    "a folder": folder_in_its_place,
    "a link to itself": link_to_itself,
    "unreadable": unreadable,
}
TEXT: dict[str, Damage] = {"not UTF-8": not_utf8, "UTF-16": utf16, "NUL bytes": nul_bytes}
JSON: dict[str, Damage] = {"deep": deep, "a list": a_list, "no keys": no_keys, "a huge number": a_huge_number}
TENSORS: dict[str, Damage] = {
    "no tensors": no_tensors,
    "one tensor missing": one_tensor_missing,
    "not a number": tensors_not_a_number,
    "another shape": tensors_of_another_shape,
    "no metadata": no_metadata,
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
