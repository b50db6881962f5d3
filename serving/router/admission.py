"""Admission of requests within limits on bodies and places."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.router.errors import CLIENT_LEFT, ClientLeftError, RefusedError
from serving.router.limits import MOST_UNFINISHED, PLACE_BYTES, Limits, ShutdownTimer
from serving.router.metrics import Metrics

ALWAYS_ANSWERED = ("/health", "/metrics")

Sender = tuple[str, bytes]


def sender_of(scope: Scope) -> Sender:
    """The address that a request comes from, and its API key."""
    client = scope.get("client") or ("", 0)
    return client[0], dict(scope["headers"]).get(b"authorization", b"")


class Admission:
    """ASGI middleware: reads the whole body, then takes places until the answer ends."""

    def __init__(self, app: ASGIApp, metrics: Metrics, limits: Limits, stopping: ShutdownTimer) -> None:
        self._app, self._metrics, self._stopping = app, metrics, stopping
        self._bodies, self._places = _Bodies(limits), _Places(limits.in_flight, metrics)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in ALWAYS_ANSWERED:
            await self._app(scope, receive, send)
            return
        status = CLIENT_LEFT

        async def recorded(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            async with self._stopping.limited():
                body = await self._bodies.read(scope, receive)
            whole: list[Message] = [{"type": "http.request", "body": body}]
            size = len(body)
            del body

            async def replayed() -> Message:
                return whole.pop() if whole else await receive()

            with self._places.taken(sender_of(scope), size):
                await self._app(scope, replayed, recorded)
        except RefusedError as refusal:
            await refusal.response(scope, receive, recorded)
        except ClientLeftError:
            pass
        finally:
            self._metrics.answered(status)


@dataclass(eq=False, slots=True)
class _Body:
    """A body that is being read."""

    deadline: asyncio.Timeout
    content: bytearray = field(default_factory=bytearray)
    is_displaced: bool = False

    @property
    def bytes(self) -> int:
        return max(len(self.content), 64 * 1024)  # the server's own buffer


class _Bodies:
    """Reads bodies; when all together are too large, refuses the largest."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._unfinished: list[_Body] = []
        self._bytes = 0  # of all these

    async def read(self, scope: Scope, receive: Receive) -> bytes:
        """Read a whole body; raises RefusedError or ClientLeftError."""
        self._check_size(int(dict(scope["headers"]).get(b"content-length", 0)))
        body = _Body(asyncio.timeout(self._limits.client_s))
        self._unfinished.append(body)
        self._bytes += body.bytes
        try:
            async with body.deadline:
                return await self._whole(body, receive)
        except TimeoutError:
            if body.is_displaced:
                raise RefusedError(429, "too many large requests at a time; try again", {"retry-after": "1"}) from None
            message = f"the request was not whole after {self._limits.client_s:g} s; send it faster"
            raise RefusedError(408, message, {"connection": "close"}) from None
        finally:
            self._unfinished.remove(body)
            self._bytes -= body.bytes

    async def _whole(self, body: _Body, receive: Receive) -> bytes:
        while True:
            self._make_room()
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientLeftError
            before = body.bytes
            body.content += message.get("body", b"")
            self._bytes += body.bytes - before
            self._check_size(len(body.content))
            if not message.get("more_body", False):
                return bytes(body.content)

    def _check_size(self, size: int) -> None:
        if size > (most := self._limits.body_bytes):
            raise RefusedError(413, f"the request's body has {size} bytes or more; at most {most} are read")

    def _make_room(self) -> None:
        if len(self._unfinished) <= MOST_UNFINISHED and self._bytes <= self._limits.unfinished_bytes:
            return
        held = [one for one in self._unfinished if not one.is_displaced and not one.deadline.expired()]
        if len(held) > MOST_UNFINISHED or sum(one.bytes for one in held) > self._limits.unfinished_bytes:
            largest = max(held, key=lambda one: one.bytes)
            largest.is_displaced = True
            largest.deadline.reschedule(0)


class _Places:
    """The places of requests, at most half of them for one sender."""

    def __init__(self, most: int, metrics: Metrics) -> None:
        self._most, self._share, self._metrics = most, (most + 1) // 2, metrics
        self._taken: Counter[Sender] = Counter()

    @contextmanager
    def taken(self, sender: Sender, size: int) -> Iterator[None]:
        """Hold places for `size` bytes; raises RefusedError where too few are free."""
        places = min(1 + size // PLACE_BYTES, self._share)
        if self._taken.total() + places > self._most or self._taken[sender] + places > self._share:
            message = f"all {self._most} places, or this sender's {self._share}, are taken; try again"
            raise RefusedError(429, message, {"retry-after": "1"})
        self._taken[sender] += places
        self._metrics.in_flight.inc()
        try:
            yield
        finally:
            self._metrics.in_flight.dec()
            self._taken[sender] -= places
            if not self._taken[sender]:
                del self._taken[sender]
