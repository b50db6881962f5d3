"""The allocators that most tests of the runtime use."""

from dataclasses import replace
from pathlib import Path

import pytest
from tiny_allocator import ByLength, make_allocator, with_healing

from oracle.decoding import Decoding
from runtime.allocator import Allocator


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch) -> Path:
    """A cache folder of one test's own."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("LAYERBUDGET_CACHE", str(folder))
    return folder


@pytest.fixture(scope="module")
def plain(model) -> Allocator:
    return make_allocator(model)


@pytest.fixture(scope="module")
def other(model) -> Allocator:
    """Differs from the plain one in the manifest, and in a file that the plain one lacks."""
    return replace(with_healing(model), decoding=Decoding(9))


@pytest.fixture(scope="module")
def allocator(model) -> Allocator:
    """Gives the prompts of `padded_batch` the plans `CHOSEN`."""
    return make_allocator(model, controller=ByLength())
