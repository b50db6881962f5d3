"""The router's routes: completions and chat with a plan each, the engine's models, health, metrics.

Every accepted request ends with the engine's answer or with an error that says what happened, also when the engine
dies in the middle of a stream.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from serving.router.admission import Admission, sender_of
from serving.router.engines import Engines, UpstreamCheck, Upstreams
from serving.router.errors import CLIENT_LEFT, RefusedError
from serving.router.limits import ShutdownTimer
from serving.router.metrics import Metrics
from serving.router.requests import BodyThreads, RequestBody, forwarded_headers
from serving.router.selector import Choice, Prompts, RequestSelector

PLAN_HEADER = "x-layer-plan"
"""Header of every engine answer: the plan that its prompt ran."""

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
HEALTH_S = 10.0


def make_app(selector: RequestSelector, upstreams: Upstreams, *, is_checked: bool = True) -> FastAPI:
    """The router as an ASGI application, within the limits of the selector.

    Args:
        selector: decides about each request.
        upstreams: the engines that answer.
        is_checked: `Upstreams.check` is done. Else it is asked again until the engine answers, and all run in full.
    """
    router = _Router(selector, upstreams, is_checked)
    app = FastAPI(lifespan=router.running, docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    app.state.stopping = router.stopping
    app.add_exception_handler(HTTPException, not_found)
    app.add_middleware(Admission, metrics=router.metrics, limits=selector.limits, stopping=router.stopping)
    for path in (COMPLETIONS, CHAT):
        app.add_api_route(path, router.answer, methods=["POST"])
    app.add_api_route("/v1/models", router.models, methods=["GET"])
    app.add_api_route("/health", router.health, methods=["GET"])
    app.add_api_route("/metrics", router.metrics_page, methods=["GET"])
    return app


class _Router:
    def __init__(self, selector: RequestSelector, upstreams: Upstreams, is_checked: bool) -> None:
        self._selector, self._upstreams = selector, upstreams
        self._check = UpstreamCheck(upstreams, is_checked)
        self.stopping = ShutdownTimer()
        self.metrics = Metrics(selector.allocator.menu.n_layers)
        self._engines = Engines(selector.limits.engine_s, self.stopping, self.metrics.broken.inc)
        self._bodies = BodyThreads()
        self._checking: asyncio.Task[dict[str, bool]] | None = None

    @asynccontextmanager
    async def running(self, app: FastAPI) -> AsyncIterator[None]:
        """From the router's start to its end."""
        deciding = asyncio.create_task(self._selector.serve())
        self._check.start()
        try:
            yield
        finally:
            deciding.cancel()
            self._check.end()
            self._bodies.close()
            self._selector.close()
            await self._engines.close()

    async def models(self, request: Request) -> Response:
        return await cancelled_on_disconnect(request, self._models(request))

    async def _models(self, request: Request) -> Response:
        async with self.stopping.limited():
            url = self._upstreams.engine
            answer = await self._engines.ask(url, "/v1/models", forwarded_headers(request.headers))
            return await self._engines.relay(answer, url, {})

    async def health(self) -> Response:
        """Status 200 if every engine is well, else 503."""
        if self._checking is None or self._checking.done():  # many who ask cost no more than one
            self._checking = asyncio.create_task(self._well())
        well = await asyncio.shield(self._checking)
        return JSONResponse({"engines": well}, 200 if all(well.values()) else 503)

    async def _well(self) -> dict[str, bool]:
        async def is_well(url: str) -> bool:
            try:
                answer = await self._engines.ask(url, "/health", {}, silence_s=HEALTH_S)
            except RefusedError:
                return False
            await answer.aclose()
            return bool(answer.status_code == 200)

        urls = self._upstreams.urls
        return dict(zip(urls, await asyncio.gather(*map(is_well, urls)), strict=True))

    async def metrics_page(self) -> Response:
        drift = self._selector.allocator.drift
        page = self.metrics.page(drift=drift is not None and drift.triggered)
        return Response(page, media_type="text/plain; version=0.0.4")

    async def answer(self, request: Request) -> Response:
        """Select a plan, ask the engine, pass its answer back."""
        content = [chunk async for chunk in request.stream()]
        return await cancelled_on_disconnect(request, self._forward(request, content))

    async def _forward(self, request: Request, content: list[bytes]) -> Response:
        async with self.stopping.limited():
            start, headers = time.perf_counter(), forwarded_headers(request.headers)
            choice, url, own_content = await self._select(request, content)
            self.metrics.chosen(choice, (time.perf_counter() - start) * 1000)
            answer = await self._engines.ask(url, request.scope["path"], headers, own_content)
            self.metrics.first_byte.observe(time.perf_counter() - start)
            return await self._engines.relay(answer, url, {PLAN_HEADER: str(choice.plan)})

    async def _select(self, request: Request, content: list[bytes]) -> tuple[Choice, str, bytes]:
        """The choice, the engine's URL, and the body for it."""
        chat = request.scope["path"] == CHAT

        def read(fields: dict[str, Any], body: RequestBody) -> tuple[RequestBody, Prompts | str]:
            return body, self._selector.read(fields, chat=chat)

        body, prompts = await self._bodies.read(content, read)
        choice = self._available(await self._selector.plan_for(prompts, sender_of(request.scope)))
        url, xarg = self._upstreams.route(choice.plan)
        return choice, url, body.with_plan(xarg)

    def _available(self, choice: Choice) -> Choice:
        """The choice, if there is an engine that runs it."""
        if not self._check.is_done:
            return self._selector.full("unchecked")
        return choice if self._upstreams.runs(choice.plan) else self._selector.full("no_pool")


async def not_found(request: Request, error: Exception) -> Response:
    """The answer for a path or method that there is not."""
    assert isinstance(error, HTTPException)
    return RefusedError(error.status_code, f"{request.scope['method']} of this path: {error.detail}").response


async def cancelled_on_disconnect(request: Request, work: Coroutine[Any, Any, Response]) -> Response:
    """The result of the work, which is cancelled if the client leaves."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.create_task(work), asyncio.create_task(gone())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else Response(status_code=CLIENT_LEFT)
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)
