"""Limits of the router; `docs/serving.md` has the table."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from serving.router.errors import RefusedError

PLACE_BYTES = 256 * 1024
"""A request takes a place for each of these of its body. Answers up to this size are held, longer ones streamed."""

MOST_UNFINISHED = 1024
"""Connections without a whole head, and bodies that are not whole."""

MOST_LEVELS = 100
"""Arrays and objects inside one another in a request's body."""

MOST_COMMAS = 2**18
"""In a request's body: a bound on its values, whose parsing stops all else. Text with more has more tokens than a model
takes."""


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits that the command line sets.

    Attributes:
        in_flight: places, which requests hold until their answers end; beyond them, and beyond half of them for one
            sender (address and `authorization`), status 429.
        body_bytes: longest body of a request; beyond it status 413.
        client_s: longest time until a request is whole, and longest time in which a client takes nothing of its answer.
        engine_s: longest silence of an engine before its request ends with status 504.
        decision_ms: a request without a plan after this time runs the full one.
        decision_tokens: padded tokens of one decision; a request with more runs the full plan.
        stop_s: time for the requests in flight after SIGTERM.
    """

    in_flight: int = 256
    body_bytes: int = 4 * 1024 * 1024
    client_s: float = 30.0
    engine_s: float = 600.0
    decision_ms: float = 500.0
    decision_tokens: int = 4096
    stop_s: float = 30.0

    @property
    def unfinished_bytes(self) -> int:
        """Limit of all bodies that are not whole."""
        return self.in_flight * PLACE_BYTES + self.body_bytes


class ShutdownTimer:
    """Ends all that waits at the end of the time after SIGTERM."""

    def __init__(self) -> None:
        self._waiting: set[asyncio.Timeout] = set()
        self._is_over = False

    @asynccontextmanager
    async def limited(self) -> AsyncIterator[None]:
        """Raises RefusedError once the time is over."""
        limit = asyncio.timeout(0 if self._is_over else None)
        try:
            async with limit:
                self._waiting.add(limit)
                yield
        except TimeoutError:
            if not limit.expired():
                raise
            raise RefusedError(503, "the router stops; send the request again", {"retry-after": "1"}) from None
        finally:
            self._waiting.discard(limit)

    def end(self) -> None:
        self._is_over = True
        for limit in self._waiting:
            if not limit.expired():
                limit.reschedule(0)
