"""Files of a saved allocator that lie elsewhere, or are too large: not read, and not followed when saving."""

import os
import shutil
from functools import partial

import pytest
from command import snapshot

from backbone.errors import ArtefactError
from runtime.allocator import Allocator
from runtime.saving.allocator_files import content_digest

LINKED = ("manifest.json", "menu.json", "controller.safetensors")


def linked(how, folder, name) -> None:
    """A file of the folder as a link to one outside."""
    outside = (folder / name).rename(folder.parent / f"outside-{how.__name__}-{name}")
    how(outside, folder / name)


def pointed(folder) -> None:
    """The folder of an unfinished save as a link to somebody else's allocator."""
    shutil.copytree(folder, folder.parent / "theirs")
    (folder / "manifest.json").unlink()
    (folder / ".layerbudget-replacement").symlink_to(folder.parent / "theirs")


def sparse(name):
    return lambda folder: os.truncate(folder / name, 2**37)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        *[(partial(linked, os.symlink, name=name), "is a link to .*, outside of its folder") for name in LINKED],
        *[(partial(linked, os.link, name=name), "is a hard link to a file outside") for name in LINKED],
        (pointed, "is a link to .*, outside of its folder"),
        (sparse("manifest.json"), r"manifest\.json has 137438953472 bytes; such a file has at most 1048576"),
        (sparse("menu.json"), r"menu\.json has 137438953472 bytes; such a file has at most 1048576"),
        (sparse("README.md"), r"README\.md has 137438953472 bytes; such a file has at most 1048576"),
        (sparse("controller.safetensors"), r"controller\.safetensors has 137438953472 bytes"),
    ],
)
def test_links_out_of_the_folder_and_huge_files_are_refused(plain, tmp_path, damage, message) -> None:
    """Whatever their content, and before it is read."""
    folder = tmp_path / "allocator"
    plain.save_pretrained(folder)
    damage(folder)
    with pytest.raises(ArtefactError, match=message):
        Allocator.from_pretrained(folder)


def test_links_within_the_folder_and_the_hubs_cache_are_read(plain, tmp_path) -> None:
    plain.save_pretrained(tmp_path / "snapshots" / "abc" / "sub")
    folder, blobs = tmp_path / "snapshots" / "abc" / "sub", tmp_path / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(blobs / str(number))
        path.symlink_to(f"../../../blobs/{number}")
    os.link(folder / "menu.json", folder / "same.json", follow_symlinks=True)
    (tmp_path / "link").symlink_to(folder)
    for place in (folder, tmp_path / "link"):
        assert content_digest(Allocator.from_pretrained(place)) == content_digest(plain)


def test_a_save_does_not_follow_the_link_of_an_unfinished_one(plain, other, tmp_path) -> None:
    other.save_pretrained(tmp_path / "theirs")
    before = snapshot(tmp_path / "theirs")
    for name in (".layerbudget-replacement", ".layerbudget-saving"):
        (tmp_path / name).mkdir()
        (tmp_path / name / ".layerbudget-replacement").symlink_to(tmp_path / "theirs")
        (tmp_path / name / ".layerbudget-saving").symlink_to(tmp_path / "theirs")
        plain.save_pretrained(tmp_path / name)
        assert content_digest(Allocator.from_pretrained(tmp_path / name)) == content_digest(plain)
    assert snapshot(tmp_path / "theirs") == before
