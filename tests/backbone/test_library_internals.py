"""Every undocumented name that the project relies on is there, in a version that was tried."""

import inspect
from functools import reduce
from importlib import import_module

import pytest
import transformers
from transformers import DynamicCache

from backbone.library_internals import ARGUMENTS, ATTRIBUTES, OF_INSTANCES, TRIED


def found(place: str) -> object:
    module, _, path = place.partition(":")
    return reduce(getattr, path.split("."), import_module(module))


def test_the_version_is_one_that_was_tried() -> None:
    assert transformers.__version__.rsplit(".", 1)[0] in TRIED


@pytest.mark.parametrize("place", ATTRIBUTES)
def test_names_are_there(place) -> None:
    assert found(place) is not None or place.endswith("_compiled_call_impl")


@pytest.mark.parametrize("place", ARGUMENTS)
def test_parameters_are_there(place) -> None:
    assert set(ARGUMENTS[place]) <= inspect.signature(found(place)).parameters.keys()


def test_attributes_of_instances_are_there(model) -> None:
    instances = {"cache": DynamicCache(), "model": model}
    for place in OF_INSTANCES:
        name, *path = place.split(".")
        reduce(getattr, path, instances[name])
