"""HTTP to the engines: each request on a connection of its own, without cookies, accounts, redirects or proxies."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import TypeVar

import anyio
import httpx2
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from serving.router.errors import RefusedError, encoded_events, of_engine
from serving.router.limits import PLACE_BYTES
from serving.router.stopping import Stopping

T = TypeVar("T")

_PASSED_BACK = (b"content-type", b"content-encoding")


class Engines:
    """Asks engines, and passes their answers back.

    Nothing of a request outlives it: there is no client that could keep a cookie, and no connection is used again, on
    which an engine could have left a second answer.

    Args:
        silence_s: longest silence of an engine.
        stopping: ends what waits for an engine.
        broken: called for each answer that breaks off after its begin.
    """

    def __init__(self, silence_s: float, stopping: Stopping, broken: Callable[[], None]) -> None:
        self._silence_s, self._stopping, self._broken = silence_s, stopping, broken
        self._transport = httpx2.AsyncHTTPTransport(trust_env=False, limits=httpx2.Limits(max_connections=None))

    async def close(self) -> None:
        await self._transport.aclose()

    async def ask(
        self, url: str, path: str, headers: dict[str, str], content: bytes | None = None, silence_s: float | None = None
    ) -> httpx2.Response:
        """An engine's answer, whose body is still to be read. POST where there is content.

        Raises:
            RefusedError: the engine cannot be reached, is silent, or answers what is no answer.
        """
        own = {"accept-encoding": "identity", "connection": "close", **headers}
        timeout = httpx2.Timeout(silence_s or self._silence_s, connect=10.0).as_dict()
        extensions = {"timeout": timeout}
        if content is not None:
            own["content-type"] = "application/json"
        request = httpx2.Request(
            "GET" if content is None else "POST", url + path, headers=own, content=content, extensions=extensions
        )
        try:
            answer = await self._transport.handle_async_request(request)
        except httpx2.HTTPError as error:
            raise of_engine(error, url) from None
        if 200 <= answer.status_code < 300 or 400 <= answer.status_code < 600:
            return answer
        await answer.aclose()
        raise RefusedError(502, f"the engine at {url} answered with status {answer.status_code}")

    async def passed_back(self, answer: httpx2.Response, url: str, headers: dict[str, str]) -> Response:
        """The answer for the client: events and long answers as they come, short ones whole.

        Raises:
            RefusedError: the engine breaks off in a short answer.
        """
        kept = {name.lower().decode(): value.decode("latin-1") for name, value in answer.headers.raw}
        headers = {name.decode(): kept[name.decode()] for name in _PASSED_BACK if name.decode() in kept} | headers
        chunks = answer.aiter_raw()
        if kept.get("content-type", "").startswith("text/event-stream"):
            return _Passing(answer, self._rest(chunks, url, b""), headers)
        held = b""
        try:
            async for chunk in chunks:
                held += chunk
                if len(held) > PLACE_BYTES:
                    return _Passing(answer, self._rest(chunks, url, held), headers)
        except httpx2.HTTPError as error:
            await answer.aclose()
            raise of_engine(error, url) from None
        except BaseException:
            with anyio.CancelScope(shield=True):
                await answer.aclose()
            raise
        await answer.aclose()
        return Response(held, answer.status_code, headers)

    async def _rest(self, chunks: AsyncIterator[bytes], url: str, held: bytes) -> AsyncIterator[bytes]:
        """What is held and what follows; if the engine breaks off, an event that says so."""
        try:
            while True:
                if held:
                    yield held
                async with self._stopping.limited():
                    held = await anext(chunks)
        except StopAsyncIteration:
            return
        except (httpx2.HTTPError, RefusedError) as error:
            self._broken()
            yield encoded_events(error if isinstance(error, RefusedError) else of_engine(error, url))


class _Passing(StreamingResponse):
    """A stream whose source is closed in any case, so that the engine stops when the client has left."""

    def __init__(self, answer: httpx2.Response, chunks: AsyncIterator[bytes], headers: dict[str, str]) -> None:
        super().__init__(chunks, answer.status_code, headers)
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            with anyio.CancelScope(shield=True):
                await self._answer.aclose()
