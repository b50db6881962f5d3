"""A warning where a call generates otherwise than the answers that an allocator was certified on."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator, Mapping
from typing import Any
from weakref import WeakSet

from controller.base import Controller
from runtime.parts import AllocatorParts

_warned: WeakSet[Controller] = WeakSet()
"""Controllers of the allocators that were warned of in this process; copies of an allocator share theirs."""
_lock = threading.Lock()


class UncertifiedDecodingWarning(UserWarning):
    """A call decodes otherwise than the certificate says; the message says how."""


def warn_of_other_decoding(allocator: AllocatorParts, asked: Mapping[str, Any]) -> None:
    """Warn, once an allocator and process, of longer answers, other stop strings, sampling or beams.

    Without a certified price nothing is promised, and nothing is said.

    Args:
        allocator: whose certificate it is.
        asked: what a call asks for: `do_sample`, `num_beams`, `max_new_tokens`, `stop_strings`.
    """
    if allocator.certificate.price is None or not (found := list(_differences(allocator, asked))):
        return
    with _lock:
        if allocator.controller in _warned:
            return
        _warned.add(allocator.controller)
    certified = allocator.certificate.decoding or str(allocator.decoding)
    text = (
        f"the certificate covers answers by {certified!r}, and this call has {', '.join(found)}: its bound does not "
        "hold for these answers; later calls of this allocator are not named"
    )
    warnings.warn(UncertifiedDecodingWarning(text), stacklevel=2)


def _differences(allocator: AllocatorParts, asked: Mapping[str, Any]) -> Iterator[str]:
    decoding = allocator.decoding
    if allocator.certificate.decoding not in ("", str(decoding)):
        yield f"an allocator whose decoding was changed to {str(decoding)!r}"
    if asked["do_sample"]:
        yield "do_sample=True"
    if (asked["num_beams"] or 1) > 1:
        yield f"num_beams={asked['num_beams']}"
    if (asked["max_new_tokens"] or 0) > decoding.max_new_tokens:
        yield f"max_new_tokens={asked['max_new_tokens']}"
    strings = [asked["stop_strings"]] if isinstance(asked["stop_strings"], str) else asked["stop_strings"] or ()
    if strings and {*strings} != {*decoding.stop}:
        yield f"stop_strings={sorted(strings)}"
