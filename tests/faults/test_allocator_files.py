"""Every file of a saved allocator, damaged as it is, and damaged under a manifest whose digests fit the damage."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from pathlib import Path

import pytest
from damage import Damage, damages_of
from keys import WRONG, Keys, without, wrong
from outcome import GOOD, Outcome, judged
from project import Project
from selection import selected

MLP = ("menu.json", "projection.safetensors", "certificate.json", "controller.safetensors", "drift.safetensors",
       "outliers.safetensors", "healing.safetensors")  # fmt: skip
TREES = ("controller.safetensors",)
FILES = [("finished", name) for name in (*MLP, "README.md", "manifest.json")] + [("trees", name) for name in TREES]

ANY_DAMAGE = [(owner, name, damage) for owner, name in FILES for damage in damages_of(name)]

FLIPS_AND_TEXT = ("bits flipped", "a folder", "a link", "unreadable", "garbage behind", "last byte gone")
"""Under a digest that fits, a flipped bit is another allocator, and the rest is no content to take a digest of."""

SIGNED = [
    (owner, name, damage)
    for owner, name in FILES
    if name not in ("README.md", "manifest.json")
    for damage in damages_of(name)
    if not damage.startswith(FLIPS_AND_TEXT)
]
KEYS: list[Keys] = [
    *[(key,) for key in ("format_version", "model", "controller", "decoding", "files")],
    *[("model", key) for key in ("fingerprint", "source")],
    *[("decoding", key) for key in ("max_new_tokens", "stop")],
    *[("files", name) for name in MLP],
]
LEGAL = {(("decoding", "max_new_tokens"), "a number"), (("model", "source"), "a text")}
OTHER_NAMES = ("../notes.txt", "/etc/hostname", "sub/notes.txt", "..", "", "manifest.json", "no\0name", "a" * 300)


def digest_of(manifest: dict) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def signed(folder: Path) -> None:
    """The manifest as if the damaged files had been saved so."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    for name in list(manifest["files"]):
        if (folder / name).is_file():
            manifest["files"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        else:
            del manifest["files"][name]
    write_manifest(folder, manifest)


def write_manifest(folder: Path, manifest: dict) -> None:
    manifest.pop("digest", None)
    try:
        digest = digest_of(manifest)
    except UnicodeEncodeError:
        digest = ""
    (folder / "manifest.json").write_text(json.dumps({**manifest, "digest": digest}))


def check(project: Project, limits, before: str) -> tuple[Outcome, str]:
    """`generate` and `inspect`, the worse of both; an accepted allocator must answer as before."""
    foreign = project.foreign
    answered = project.command("generate", "--allocator", "runs/tiny/allocator", "abcabc", limits=limits)
    outcome, seen = judged(
        answered, project, foreign, lambda: None if answer(answered.out) == before else "another answer than undamaged"
    )
    if outcome not in GOOD:
        return outcome, seen
    shown = project.command("inspect", "runs/tiny/allocator", limits=limits)
    inspected = judged(shown, project, foreign, lambda: None)
    return (outcome, seen) if inspected[0] in GOOD else inspected


def answer(out: str) -> str:
    """What was answered, without the spinner and bars before it."""
    return out[out.index("\nabcabc") :]


@pytest.fixture(scope="session")
def answers(request: pytest.FixtureRequest) -> dict[str, str]:
    """The answer of each undamaged allocator."""

    class Lazily(dict[str, str]):
        def __missing__(self, owner: str) -> str:
            ended = request.getfixturevalue(owner).command("generate", "--allocator", "runs/tiny/allocator", "abcabc")
            assert ended.status == 0, ended.err
            self[owner] = answer(ended.out)
            return self[owner]

    return Lazily()


def _damaged(request, tmp_path: Path, owner: str, name: str, damage: Damage) -> Project:
    project: Project = request.getfixturevalue(owner).copy(tmp_path / "project")
    damage(project.allocator / name)
    return project


@pytest.mark.parametrize(("owner", "name", "damage"), selected(ANY_DAMAGE, every=30))
def test_a_damaged_file_is_refused(request, tmp_path, limits, answers, owner, name, damage, expect_good) -> None:
    project = _damaged(request, tmp_path, owner, name, damages_of(name)[damage])
    expect_good(*check(project, limits, answers[owner]))


@pytest.mark.parametrize(("owner", "name", "damage"), selected(SIGNED, every=30))
def test_a_wrong_file_under_fitting_digests_is_refused(
    request, tmp_path, limits, answers, owner, name, damage, expect_good
) -> None:
    project = _damaged(request, tmp_path, owner, name, damages_of(name)[damage])
    signed(project.allocator)
    expect_good(*check(project, limits, answers[owner]))


WRONG_KEYS = [(keys, what) for keys in KEYS for what in ("missing", *WRONG) if (keys, what) not in LEGAL]


@pytest.mark.parametrize(("keys", "what"), selected(WRONG_KEYS, every=50))
def test_a_manifest_with_a_wrong_value_is_refused(project, limits, answers, keys, what, expect_good) -> None:
    path = project.allocator / "manifest.json"
    (without(keys) if what == "missing" else wrong(keys, WRONG[what]))(path)
    with suppress(ValueError, RecursionError):  # of some no digest can be taken
        write_manifest(project.allocator, json.loads(path.read_text()))
    expect_good(*check(project, limits, answers["finished"]))


@pytest.mark.parametrize("name", selected(OTHER_NAMES, every=4))
def test_a_manifest_that_lists_other_places_is_refused(project, limits, answers, name, expect_good) -> None:
    manifest = json.loads((project.allocator / "manifest.json").read_text())
    manifest["files"][name] = "0" * 64
    write_manifest(project.allocator, manifest)
    expect_good(*check(project, limits, answers["finished"]))


METRICS = [*damages_of("metrics.json"), *(f"{key}: {what}" for key in ("prompts", "best", "captured_headroom", "full")
           for what in ("missing", *WRONG))]  # fmt: skip


@pytest.mark.parametrize("case", selected(METRICS, every=12))
def test_inspect_beside_damaged_metrics(project, limits, case, expect_good) -> None:
    path = project.run / "metrics.json"
    key, colon, what = case.partition(": ")
    if not colon:
        damages_of("metrics.json")[case](path)
    else:
        (without((key,)) if what == "missing" else wrong((key,), WRONG[what]))(path)
    ended = project.command("inspect", "runs/tiny/allocator", limits=limits)
    expect_good(*judged(ended, project, project.foreign, lambda: None))


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
