"""A loaded model in place of the one that `model.source` names. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_given: dict[str, tuple[PreTrainedModel, PreTrainedTokenizerBase]] = {}


@contextmanager
def giving(source: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """Runs of this process whose `model.source` is `source` use this model; its fingerprint is checked as ever."""
    _given[source] = model, tokenizer
    try:
        yield
    finally:
        del _given[source]


def given_model(source: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase] | None:
    """The loaded model of a source; None where it has to be loaded."""
    return _given.get(source)
