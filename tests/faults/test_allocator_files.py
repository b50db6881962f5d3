"""Every file of a saved allocator, damaged as it is, and damaged under a manifest whose digests fit the damage."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from damage import Damage, damages_of
from keys import WAYS, Keys, value_damaged
from outcome import GOOD, answers_as, judged, may_be_accepted
from project import GENERATE, Project
from selection import selected

MLP = ("menu.json", "projection.safetensors", "certificate.json", "controller.safetensors", "drift.safetensors",
       "outliers.safetensors", "healing.safetensors")  # fmt: skip
UNSIGNED = ("README.md", "manifest.json")
FILES = [*(("finished", name) for name in (*MLP, *UNSIGNED)), ("trees", "controller.safetensors")]
FLIPS_AND_TEXT = ("bits flipped", "a folder", "a link", "unreadable", "garbage behind", "last byte gone")
"""Under a digest that fits, a flipped bit is another allocator, and the rest is no content to take a digest of."""

UNDER_OLD_DIGESTS = [(owner, name, way, False) for owner, name in FILES for way in damages_of(name)]
UNDER_FITTING_DIGESTS = [
    (owner, name, way, True)
    for owner, name, way, _ in UNDER_OLD_DIGESTS
    if name not in UNSIGNED and not way.startswith(FLIPS_AND_TEXT)
]
KEYS: list[Keys] = [
    *[(key,) for key in ("format_version", "model", "controller", "decoding", "files")],
    *[("model", key) for key in ("fingerprint", "source")],
    *[("decoding", key) for key in ("max_new_tokens", "stop")],
    *[("files", name) for name in MLP],
]
LEGAL = {(("decoding", "max_new_tokens"), "a number"), (("model", "source"), "a text")}
OTHER_NAMES = ("../notes.txt", "/etc/hostname", "sub/notes.txt", "..", "", "manifest.json", "no\0name", "a" * 300)


def file_added(name: str) -> Damage:
    def damage(path: Path) -> None:
        manifest = json.loads(path.read_text())
        path.write_text(json.dumps({**manifest, "files": {**manifest["files"], name: "0" * 64}}))

    return damage


MANIFESTS = {
    f"{'.'.join(keys)} {way}": value_damaged(keys, way) for keys in KEYS for way in WAYS if (keys, way) not in LEGAL
}
OTHER_PLACES = {f"lists {name!a}": file_added(name) for name in OTHER_NAMES}
METRICS = damages_of("metrics.json") | {
    f"{key} {way}": value_damaged((key,), way)
    for key in ("prompts", "best", "captured_headroom", "full")
    for way in WAYS
}


def signed(folder: Path) -> None:
    """The manifest as if the damaged files had been saved so."""
    manifest = json.loads((folder / "manifest.json").read_text())
    files = {name: folder / name for name in manifest["files"] if (folder / name).is_file()}
    manifest["files"] = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}
    write_manifest(folder, manifest)


def write_manifest(folder: Path, manifest: dict) -> None:
    manifest.pop("digest", None)
    try:
        digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    except UnicodeEncodeError:
        digest = ""
    (folder / "manifest.json").write_text(json.dumps({**manifest, "digest": digest}))


@pytest.fixture
def expect_refused(limits, answers, expect_good) -> Callable[[Project, str], None]:
    """`generate` and `inspect` refuse an allocator, or use it as if it were undamaged; the worse of both counts."""

    def expect(project: Project, owner: str) -> None:
        foreign = project.foreign
        answered = project.command(*GENERATE, "abcabc", limits=limits)
        found = judged(answered, project, foreign, answers_as(answers[owner]))
        if found[0] in GOOD:
            shown = project.command("inspect", "runs/tiny/allocator", limits=limits)
            inspected = judged(shown, project, foreign, may_be_accepted)
            found = found if inspected[0] in GOOD else inspected
        expect_good(*found)

    return expect


@pytest.mark.parametrize(
    ("owner", "name", "way", "fitting"),
    [*selected(UNDER_OLD_DIGESTS, every=30), *selected(UNDER_FITTING_DIGESTS, every=30)],
)
def test_a_damaged_file_is_refused(request, tmp_path, expect_refused, owner, name, way, fitting) -> None:
    project = request.getfixturevalue(owner).copy(tmp_path / "project")
    damages_of(name)[way](project.allocator / name)
    if fitting:
        signed(project.allocator)
    expect_refused(project, owner)


@pytest.mark.parametrize("case", [*selected(list(MANIFESTS), every=50), *selected(list(OTHER_PLACES), every=4)])
def test_a_manifest_with_a_wrong_value_is_refused(project, expect_refused, case) -> None:
    path = project.allocator / "manifest.json"
    {**MANIFESTS, **OTHER_PLACES}[case](path)
    with suppress(ValueError, RecursionError):  # of some no digest can be taken
        write_manifest(project.allocator, json.loads(path.read_text()))
    expect_refused(project, "finished")


@pytest.mark.parametrize("case", selected(list(METRICS), every=12))
def test_inspect_beside_damaged_metrics(project, attempt, case) -> None:
    METRICS[case](project.run / "metrics.json")
    attempt(project, "inspect", "runs/tiny/allocator")


def test_inspect_shows_control_characters_as_escapes(project) -> None:
    manifest = json.loads((project.allocator / "manifest.json").read_text())
    manifest["model"]["source"] = "\x1b[2Jmine\nPrice        0"
    write_manifest(project.allocator, manifest)
    metrics = json.loads((project.run / "metrics.json").read_text())
    metrics["\x1b[31mred"] = metrics["full"]
    (project.run / "metrics.json").write_text(json.dumps(metrics))
    shown = project.command("inspect", "runs/tiny/allocator").out
    assert r"Model        \x1b[2Jmine\nPrice        0 (" in shown
    assert r"\x1b[31mred" in shown
    assert "\x1b" not in shown
