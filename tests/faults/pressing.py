"""Signals that a process sends to itself when it calls a function, in the worst places that Python has for them."""

from __future__ import annotations

import signal
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from importlib import import_module
from typing import Any, Literal

Place = Literal["plain", "destructor", "callback"]


@dataclass(frozen=True, slots=True)
class Press:
    """Ctrl-C, or another signal, when a function is called.

    Attributes:
        function: as `module:name`, or `module:Class.name`.
        call: which of its calls, counted from 1.
        times: how often in a row.
        place: where exceptions are dropped, in a destructor or a weak reference's callback, or not.
    """

    function: str
    call: int = 1
    times: int = 1
    place: Place = "plain"
    signal: signal.Signals = signal.SIGINT

    def install(self) -> None:
        """Wrap the function in this process."""
        module, _, name = self.function.partition(":")
        *owners, last = name.split(".")
        owner: Any = import_module(module)
        for part in owners:
            owner = getattr(owner, part)
        wrapped, calls = getattr(owner, last), [0]

        @wraps(wrapped)
        def pressing(*arguments: Any, **options: Any) -> Any:
            calls[0] += 1
            if calls[0] == self.call:
                _PLACES[self.place](self._send)
            return wrapped(*arguments, **options)

        setattr(owner, last, pressing)

    def _send(self) -> None:
        for _ in range(self.times):
            signal.raise_signal(self.signal)


class _Dropped:
    """Does something when nobody refers to it any more."""

    def __init__(self, send: Callable[[], None]) -> None:
        self._send = send

    def __del__(self) -> None:
        self._send()


def _in_destructor(send: Callable[[], None]) -> None:
    _Dropped(send)


def _in_callback(send: Callable[[], None]) -> None:
    dropped = _Dropped(lambda: None)
    reference = weakref.ref(dropped, lambda _: send())
    del dropped
    assert reference() is None


_PLACES = {"plain": lambda send: send(), "destructor": _in_destructor, "callback": _in_callback}
