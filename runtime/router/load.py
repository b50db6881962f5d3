"""How many requests are answered at a time; those beyond are refused at once, so that no queue grows without end."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from runtime.router.errors import CLIENT_LEFT, error_response
from runtime.router.metrics import Metrics


class LoadLimit:
    """ASGI middleware: counts requests from their begin to the end of their answers.

    Args:
        most: answered at a time; the next one gets status 429.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, most: int) -> None:
        self._app, self._metrics, self._most, self._in_flight = app, metrics, most, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        if self._in_flight >= self._most:
            refusal = error_response(429, f"{self._most} requests are being answered; try again", {"retry-after": "1"})
            self._metrics.answered(429)
            await refusal(scope, receive, send)
            return
        status = CLIENT_LEFT

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self._count(1)
        try:
            await self._app(scope, receive, noting)
        finally:
            self._count(-1)
            self._metrics.answered(status)

    def _count(self, more: int) -> None:
        self._in_flight += more
        self._metrics.in_flight.set(self._in_flight)
