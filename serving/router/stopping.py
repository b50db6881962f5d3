"""The end of the time that requests in flight have after SIGTERM."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from serving.router.errors import RefusedError


class Stopping:
    """Ends all that waits, with an answer that says so."""

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
