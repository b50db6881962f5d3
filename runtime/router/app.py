"""The router's routes: completions and chat with a plan each, the engine's models, health, metrics.

Every accepted request ends with the engine's answer or with an error that says what happened, also when the engine
dies in the middle of a stream.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeVar

import anyio
import httpx2
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.types import Receive, Scope, Send

from runtime.router.choosing import Chooser
from runtime.router.errors import CLIENT_LEFT, error_body, error_response, of_engine
from runtime.router.load import LoadLimit
from runtime.router.metrics import Metrics
from runtime.router.upstreams import Upstreams

T = TypeVar("T")
PLAN_HEADER = "x-layer-plan"
"""Of every answer: the plan that its prompt ran."""


def make_app(chooser: Chooser, upstreams: Upstreams, *, max_in_flight: int = 256, timeout_s: float = 600.0) -> FastAPI:
    """The router as an ASGI application.

    Args:
        chooser: decides about each request.
        upstreams: the engines that answer.
        max_in_flight: requests answered at a time; beyond that they are refused with status 429.
        timeout_s: the longest silence of an engine before its request ends with status 504.
    """
    metrics = Metrics(chooser.allocator.menu.n_layers)
    router = _Router(chooser, upstreams, metrics, timeout_s)
    app = FastAPI(title="layerbudget", lifespan=router.running, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(LoadLimit, metrics=metrics, most=max_in_flight)
    for path in ("/v1/completions", "/v1/chat/completions"):
        app.add_api_route(path, router.answer, methods=["POST"])
    app.add_api_route("/v1/models", router.models, methods=["GET"])
    app.add_api_route("/health", router.health, methods=["GET"])
    app.add_api_route("/metrics", router.metrics_page, methods=["GET"])
    return app


class _Router:
    def __init__(self, chooser: Chooser, upstreams: Upstreams, metrics: Metrics, timeout_s: float) -> None:
        self._chooser, self._upstreams, self._metrics = chooser, upstreams, metrics
        self._timeout = httpx2.Timeout(timeout_s, connect=10.0)
        self._client: httpx2.AsyncClient

    @asynccontextmanager
    async def running(self, app: FastAPI) -> AsyncIterator[None]:
        """From the router's start to its end."""
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=64)
        async with httpx2.AsyncClient(timeout=self._timeout, limits=limits) as self._client:
            deciding = asyncio.create_task(self._chooser.serve())
            try:
                yield
            finally:
                deciding.cancel()
                self._chooser.close()

    async def models(self) -> Response:
        try:
            answer = await self._client.get(f"{self._upstreams.engine}/v1/models")
        except httpx2.HTTPError as error:
            return error_response(*of_engine(error, self._upstreams.engine))
        return Response(answer.content, answer.status_code, media_type=answer.headers.get("content-type"))

    async def health(self) -> Response:
        """Status 200 if every engine says it is well, else 503 with the ones that do not."""

        async def is_well(url: str) -> bool:
            with suppress(httpx2.HTTPError):
                return bool((await self._client.get(f"{url}/health", timeout=10)).status_code == 200)
            return False

        urls = self._upstreams.urls
        well = dict(zip(urls, await asyncio.gather(*map(is_well, urls)), strict=True))
        return JSONResponse({"engines": well}, 200 if all(well.values()) else 503)

    async def metrics_page(self) -> Response:
        drift = self._chooser.allocator.drift
        page = self._metrics.page(drift=drift is not None and drift.rung)
        return Response(page, media_type="text/plain; version=0.0.4")

    async def answer(self, request: Request) -> Response:
        """Decide, pass on, pass back."""
        try:
            body = await request.json()
        except ValueError:
            body = None
        if not isinstance(body, dict):
            return error_response(400, "the body of a request is a JSON object")
        response = await _unless_gone(request, self._passed_on(request, body))
        return Response(status_code=CLIENT_LEFT) if response is None else response

    async def _passed_on(self, request: Request, body: dict[str, Any]) -> Response:
        start = time.perf_counter()
        choice = await self._chooser.plan_for(body)
        self._metrics.chosen(choice, (time.perf_counter() - start) * 1000)
        url, own_body = self._upstreams.route(body, choice.plan)
        own = {name: request.headers[name] for name in ("authorization", "x-request-id") if name in request.headers}
        outgoing = self._client.build_request("POST", f"{url}{request.url.path}", json=own_body, headers=own)
        headers = {PLAN_HEADER: str(choice.plan)}
        try:
            incoming = await self._client.send(outgoing, stream=True)
            self._metrics.first_byte.observe(time.perf_counter() - start)
            if incoming.headers.get("content-type", "").startswith("text/event-stream"):
                return _Events(incoming, self._events(incoming, url), headers)
            content = await incoming.aread()
        except httpx2.HTTPError as error:
            return error_response(*of_engine(error, url), headers)
        return Response(content, incoming.status_code, headers, incoming.headers.get("content-type"))

    async def _events(self, incoming: httpx2.Response, url: str) -> AsyncIterator[bytes]:
        """The engine's events as they come; if it breaks off, an event that says so."""
        try:
            async for chunk in incoming.aiter_bytes():
                yield chunk
        except httpx2.HTTPError as error:
            self._metrics.broken.inc()
            yield f"\n\ndata: {json.dumps(error_body(*of_engine(error, url)))}\n\ndata: [DONE]\n\n".encode()


class _Events(StreamingResponse):
    """A stream whose source is closed in any case, so that the engine stops when the client has left."""

    def __init__(self, incoming: httpx2.Response, events: AsyncIterator[bytes], headers: dict[str, str]) -> None:
        super().__init__(events, incoming.status_code, headers, incoming.headers["content-type"])
        self._incoming = incoming

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            with anyio.CancelScope(shield=True):
                await self._incoming.aclose()


async def _unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T | None:
    """What the work gives; None, and the work cancelled, if the client leaves before."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.create_task(work), asyncio.create_task(gone())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        working.cancel()
        leaving.cancel()
