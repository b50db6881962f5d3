"""Changes to a valid allocator after which it is none, under digests that fit: a table, and how it is run."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file
from selection import LONG

Forge = Callable[[Path], None]
HUGE, TENSORS = 10**400, ".safetensors"
DEEP = "[" * 100_000


def json_put(name: str, keys: tuple[Any, ...], value: Any, folder: Path) -> None:
    """One value of a JSON file; a function makes it of the old one, `...` takes it away."""
    path = folder / name
    data = parent = json.loads(path.read_text())
    for key in keys[:-1]:
        parent = parent[key]
    if value is ...:
        del parent[keys[-1]]
    else:
        parent[keys[-1]] = value(parent[keys[-1]]) if callable(value) else value
    path.write_text(json.dumps(data))


def tensor_put(name: str, tensor: str, change: Callable[[Any], Any] | None, folder: Path) -> None:
    """One tensor of a file; without a change it is taken away."""
    path = folder / f"{name}{TENSORS}"
    with safe_open(path, "numpy") as file:
        arrays, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    old = arrays.pop(tensor)
    if change is not None:
        arrays[tensor] = np.ascontiguousarray(change(old.copy()))
    save_file(arrays, path, metadata)


def about_put(name: str, change: Any, folder: Path) -> None:
    """The one entry of a file's metadata: another text, or a JSON value changed; None takes it away."""
    path = folder / f"{name}{TENSORS}"
    with safe_open(path, "numpy") as file:
        arrays, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    ((key, text),) = metadata.items()
    if isinstance(change, dict):
        change = json.dumps({one: value for one, value in {**json.loads(text), **change}.items() if value is not ...})
    save_file(arrays, path, None if change is None else {key: change})


def part_left_out(name: str, folder: Path) -> None:
    (folder / name).unlink()
    json_put("manifest.json", ("files", name), ..., folder)


def at(place: int | tuple[int, ...], value: Any) -> Callable[[Any], Any]:
    def change(array: Any) -> Any:
        array[place] = value
        return array

    return change


SHAPES: dict[str, Callable[[Any], Any] | None] = {
    "missing": None,
    "another type": lambda array: array.astype(np.int16),
    "half the precision": lambda array: array.astype(np.float16),
    "one dimension more": lambda array: array[None],
    "empty": lambda array: array[:0],
    "one row too many": lambda array: np.concatenate([array, array[-1:]]),
}
BAD_NUMBERS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
NODES = ("feature", "threshold", "left", "right", "value")


def chain(folder: Path) -> None:
    """One tree that goes 600 decisions deep."""
    n = 600
    inner, leaf, places = np.arange(n), np.full(n + 1, -1), np.arange(n, 2 * n + 1)
    sides = {"left": np.concatenate([places[:-1], leaf]), "right": np.concatenate([[*range(1, n), 2 * n], leaf])}
    every_tree(folder, {"feature": np.concatenate([inner * 0, leaf]), **sides, "roots": np.array([0])}, [1, 1])


def many(folder: Path) -> None:
    """100,002 trees of a leaf each."""
    n = 100_002
    leaf = np.full(n, -1)
    every_tree(folder, {"feature": leaf, "left": leaf, "right": leaf, "roots": np.arange(n)}, [n - 1, 1])


def every_tree(folder: Path, arrays: dict[str, Any], counts: list[int]) -> None:
    size, arrays["counts"] = len(arrays["feature"]), np.array(counts)
    for name in NODES[1::3]:
        arrays[name] = np.zeros(size)
    if arrays["counts"].sum() > len(arrays["roots"]):  # the second model is a leaf of its own
        arrays["roots"] = np.append(arrays["roots"], size)
        for name in NODES:
            arrays[name] = np.append(arrays[name], -1 if name in ("feature", "left", "right") else 0)
    for name, array in arrays.items():
        kind = np.float64 if name in ("threshold", "value") else np.int32
        tensor_put("controller", name, lambda _, a=array, k=kind: a.astype(k), folder)  # type: ignore[misc]


def of_trees() -> Iterator[tuple[str, Forge]]:
    yield "undamaged", lambda folder: None
    put = partial(partial, tensor_put, "controller")
    for name in (*NODES, "roots", "counts", "budgets"):
        yield from ((f"{name}: {what}", put(name, change)) for what, change in SHAPES.items())
    for value in (99, 10**6, -2, -(2**31), 2**31 - 1):
        yield f"feature {value}", put("feature", at(0, value))
    for side in ("left", "right"):
        for value in (-500, -1, 0, 10**6, -(2**31), 2**31 - 1):
            yield f"{side} child {value}", put(side, at(0, value))
        yield f"{side} child beyond the tree", put(side, lambda a: at(0, len(a) - 1)(a))
        yield f"{side} child of a leaf", put(side, lambda a: at(int(np.flatnonzero(a == -1)[0]), len(a) - 1)(a))
        yield f"{side} child twice", put(side, lambda a: at(0, a[1])(a))
    yield "one child on both sides", lambda folder: tensor_put("controller", "right", lambda _: left_of(folder), folder)
    for what, value in BAD_NUMBERS.items():
        yield from ((f"{name} {what}", put(name, at(0, value))) for name in ("threshold", "value", "budgets"))
    yield from ((f"value {value:g}", put("value", at(-1, value))) for value in (1e300, -1e10))
    yield from ((f"budget {value:g}", put("budgets", at(0, value))) for value in (0, -1, 2))
    yield from ((f"root {value}", put("roots", at(1, value))) for value in (0, -1, 1, 10**6, 2**31 - 1))
    yield "roots do not begin at 0", put("roots", at(0, 1))
    yield "roots descend", put("roots", lambda a: a[::-1])
    yield from ((f"count {value}", put("counts", at(0, value))) for value in (0, -1, 1, 2**31 - 1))
    yield from (("600 decisions deep", chain), ("100,002 trees", many))
    for change in (
        {"n_features": 0}, {"n_features": -1}, {"n_features": True}, {"n_features": 1.5}, {"n_features": HUGE},
        {"n_features": 4}, {"n_features": ...}, {"per_plan": 1}, {"per_plan": "x"}, {"per_plan": ...}, {"x": 1},
        {"per_plan": False}, {"least_loss": 0.5}, {"least_loss": "x"}, {"least_loss": HUGE},
        None, "", "[]", "{", "NaN", DEEP, "9" * 5000,
    ):  # fmt: skip
        yield f"metadata {str(change)[:30]}", partial(about_put, "controller", change)


def of_random(n: int) -> Iterator[tuple[str, Forge]]:
    """Some numbers of the trees replaced at random; what is still a tree may load, and must only live on."""

    def damage(seed: int, folder: Path) -> None:
        random = np.random.default_rng(seed)
        for name in random.choice([*NODES, "roots", "counts"], size=random.integers(1, 4), replace=False):
            tensor_put("controller", str(name), partial(scattered, random), folder)

    yield from ((f"seed {seed}", partial(damage, seed)) for seed in range(n))


def scattered(random: np.random.Generator, array: Any) -> Any:
    for place in random.integers(0, len(array), size=random.integers(1, 4)):
        wide = random.integers(-(2**31), 2**31) if random.random() < 0.2 else random.integers(-2, len(array) + 2)
        array[place] = random.normal() if array.dtype == np.float64 else wide
    return array


def left_of(folder: Path) -> Any:
    with safe_open(folder / "controller.safetensors", "numpy") as file:
        return file.get_tensor("left")


def of_parts() -> Iterator[tuple[str, Forge]]:
    """Of an allocator that has every part, and an MLP."""
    yield "undamaged", lambda folder: None
    files = {
        "controller": ("inner.weight", "inner.bias", "outer.weight", "bias"),
        "projection": ("mean", "scale", "components"),
        "outliers": ("mean", "scale", "components", "references", "threshold"),
        "drift": ("reference_scores",),
    }
    for file, names in files.items():
        for name in names:
            for what, change in SHAPES.items():
                if not (what == "one row too many" and name in ("references", "reference_scores", "components")):
                    yield f"{file} {name}: {what}", partial(tensor_put, file, name, change)
            for what, value in BAD_NUMBERS.items():
                if not (name == "threshold" and what == "inf"):
                    bad = at(0, value)
                    yield f"{file} {name}: {what}", partial(tensor_put, file, name, bad)
    for value in (0.0, -1.0):
        yield f"scale {value}", partial(tensor_put, "projection", "scale", at(0, value))
    for number in (1e308, 1e10, -1.0, math.inf):
        yield f"outlier threshold {number:g}", partial(tensor_put, "outliers", "threshold", at(0, number))
    for rate in (0.0, 1.0, 2.0, -0.1, "0.05", True, None, ...):
        yield f"outlier rate {rate}", partial(about_put, "outliers", {"rate": rate})
    for held in (-1, 10**10, HUGE, True, 1.5, "3", ...):
        yield f"outlier held {str(held)[:20]}", partial(about_put, "outliers", {"held": held})
    for sets in (["moods"], "states", [1], [["states"]], 5, ...):
        yield f"outlier sets {sets}", partial(about_put, "outliers", {"sets": sets})
    for text in ("[1]", '["moods"]', "5", "{", DEEP, '[["states"]]', "null", None):
        yield f"projection sets {str(text)[:20]}", partial(about_put, "projection", text)
    for score in (70_000.0, 1e308):
        yield f"drift score {score:g}", partial(tensor_put, "drift", "reference_scores", at((0, 0), score))
    yield "drift budget 2", partial(tensor_put, "drift", "reference_scores", at((0, 1), 2.0))
    yield "drift of one channel", partial(tensor_put, "drift", "reference_scores", lambda a: a[:, :1])
    for text in ("inf", "nan", "0", "1", "1.0", "-0.5", "٠.٠١", " 0.0_1", "0.0", "1e-999", "x", "", DEEP, None):
        yield f"drift rate {str(text)[:20]!r}", partial(about_put, "drift", text)
    for name in ("outliers", "drift", "healing"):
        yield f"without {name}", partial(part_left_out, name + TENSORS)
    yield "without chat", partial(part_left_out, "chat.json")
    for name, keys, values in VALUES:
        for value in values:
            yield f"{name} {keys} {str(value)[:40]!r}", partial(json_put, name, keys, value)


FIRST, NAME = ("plans", 0), "x" * 201
VALUES: list[tuple[str, tuple[Any, ...], tuple[Any, ...]]] = [
    ("manifest.json", ("padding",), ("x" * 2**20,)),
    ("manifest.json", ("format_version",), (7, 9, "8", None, ...)),
    ("manifest.json", ("controller",), (NAME, "magic", "lightgbm", None, ["mlp"])),
    ("manifest.json", ("layerbudget_version",), (NAME, 5, ...)),
    ("manifest.json", ("created",), (NAME, None, ...)),
    ("manifest.json", ("chat_template",), (NAME, "none", "0" * 16, None)),
    ("manifest.json", ("model", "fingerprint"), (NAME, 5, "other", ...)),
    ("manifest.json", ("model", "source"), ("x" * 4097, 5, ...)),
    ("manifest.json", ("decoding", "max_new_tokens"), (0, -1, 7, 10**9, HUGE, True, 6.0, "6", "٦", ...)),
    ("manifest.json", ("decoding", "stop"), (["x"] * 65, ["x" * 1001], [""], "x", [1], ["\n"])),
    ("manifest.json", ("decoding", "ends"), ([-1], [2**40], [HUGE], [True], ["1"], 5, [3])),
    ("manifest.json", ("decoding", "options"),
     ({"do_sample": True}, {"x": 1}, [], {"repetition_penalty": 3.0}, {"bad_words_ids": [[1]]})),
    ("certificate.json", ("observed_risk",), (-5, -0.1, 1.1, 1e300, HUGE, math.nan, "0", True, None)),
    ("certificate.json", ("price",), (0, -1, 1e7, 1e308, HUGE, math.inf, math.nan, "1", True)),
    ("certificate.json", ("plan",), (-1, 10, 10**10, HUGE, 0.5, "1", True)),
    ("certificate.json", ("keep",), (0, 1, -0.1, 1.5, math.nan, "x")),
    ("certificate.json", ("levels",), ("x", [2], [0.9] * 21)),
    ("certificate.json", ("delta",), (0, 1, -0.1, True)),
    ("certificate.json", ("n",), (-1, 10**10, HUGE, 1.5, True)),
    ("certificate.json", ("full_score",), (-1, 2, 1e300, None)),
    ("certificate.json", ("tolerance",), (-1, 2, 1e300)),
    ("certificate.json", ("fewest_prompts",), (-1, 10**10, 1.5)),
    ("certificate.json", ("prompts_needed",), (-1, 10**10, "x")),
    ("certificate.json", ("date",), ("2026-1-1", "٢٠٢٦-01-01", "x" * 300, 5)),
    ("certificate.json", ("prompts_hash",), (NAME, 5)),
    ("certificate.json", ("decoding",), ("x" * 10_001, "greedy max_new_tokens=9", 5)),
    ("certificate.json", ("chat_template",), (NAME, "0" * 16, 5)),
    ("certificate.json", ("risk",), ("other", ["insufficient"], None)),
    ("certificate.json", ("does_not_cover",), ("text", [5], ["x" * 10_001])),
    ("certificate.json", ("assumes",), ("text", [5], ["nothing.safetensors"], ...)),
    ("certificate.json", ("per_task",),
     ([], {"a": 1}, {"a": {"n": -1, "observed_risk": 0}}, {"a": {"n": 1, "observed_risk": -5}},
      {NAME: {"n": 1, "observed_risk": 0}}, {"a": {"n": HUGE, "observed_risk": 0}})),
    ("menu.json", ("n_layers",), (0, -1, 10_001, HUGE, 6.0, "6", True, 7)),
    ("menu.json", ("probe_depth",), (0, 7, True, 2.0, HUGE)),
    ("menu.json", ("plans",), (lambda plans: plans[:1] * 257, [], {}, lambda plans: plans[::-1], lambda p: p[:-1])),
    ("menu.json", (*FIRST, "runs"),
     ("٠-٣", "０-3", "0-3," * 50 + "0-3", "0-99999", "5-0", "", ["0-3"], "2-5", "0-1000000000000", "0-5")),
    ("menu.json", (*FIRST, "budget"), (0, -1, 2, math.nan, math.inf, "0.5", True, HUGE)),
    ("acceptance.json", ("0-5",), (-1, 2, math.nan, "1", True, HUGE, ...)),
    ("chat.json", ("hash",), ("0" * 16, "٠" * 16, "x", 5, "")),
    ("chat.json", ("special",), ([], {"bos_token": 1}, {"bos_token": NAME}, {"bos_token": "x"})),
    ("chat.json", ("head",), ([-1], [2**31], [HUGE], [1] * 5, [1.5], "x")),
    ("chat.json", ("tail",), ([-1], [1] * 9, None, ...)),
    ("chat.json", ("template",), ("{% for a in range(10**9) %}{% endfor %}",)),
]  # fmt: skip
"""File, place of a value in it, and what is put there."""


def run_table(folder: Path, bases: dict[str, Path], check: Callable[[Path, str], str], told: Connection) -> None:
    """Tell the name of each forgery before it is checked, and then what came of it."""
    from tiny_allocator import resigned

    random = [("random", of_random(3000))] if LONG else []
    for owner, forgeries in (("trees", of_trees()), ("every part", of_parts()), *random):
        for number, (name, forge) in enumerate(forgeries):
            place = folder / f"{owner}-{number}"
            shutil.copytree(bases["trees" if owner == "random" else owner], place)
            forge(place)
            resigned(place)
            told.send(f"{owner}, {name}")
            told.send(check(place, owner))
            shutil.rmtree(place)
    told.close()
