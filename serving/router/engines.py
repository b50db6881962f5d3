"""Engines behind the router: routing of plans, requests, answers."""

from __future__ import annotations

import logging
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field

import anyio
import httpx2
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from backbone.errors import InputError
from backbone.plan import LayerPlan, PlanMenu
from serving.router.errors import RefusedError, engine_error, error_events
from serving.router.limits import PLACE_BYTES, ShutdownTimer
from serving.router.requests import KEY, XARGS

logger = logging.getLogger(__name__)


class UpstreamError(InputError):
    """A wrong address, a pool for no plan, or an engine that runs no plans."""


@dataclass(frozen=True, slots=True)
class Upstreams:
    """The engines behind the router.

    Attributes:
        engine: URL of the engine that serves the full model.
        pools: by plan the URL of an engine that serves the model without the other layers (`layerbudget export`). With
            none, the engine itself runs plans (`layerbudget-vllm`).
    """

    engine: str
    pools: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, engine: str, pools: list[str], menu: PlanMenu) -> Upstreams:
        """From the command line's URL and `PLAN=URL`s.

        Raises:
            UpstreamError: see there.
        """
        if healed := [plan for plan in menu.plans if plan.healed]:
            raise UpstreamError(
                f"the menu has {healed[0]}, the full depth with an exit head, which no engine runs; serve an allocator "
                "that was made without it in menu.given"
            )
        named = {}
        for pool in pools:
            text, _, url = pool.partition("=")
            plan = LayerPlan.parse(text, menu.n_layers)
            if plan not in menu.plans or plan.is_full:
                known = "; ".join(str(one) for one in menu.plans[:-1])
                raise UpstreamError(f"--pool {pool!r} should be PLAN=URL with a shortened plan of the menu: {known}")
            named[str(plan)] = _checked_url(url)
        return cls(_checked_url(engine), named)

    def runs(self, plan: LayerPlan) -> bool:
        """Whether there is an engine that runs the plan."""
        return plan.is_full or not self.pools or str(plan) in self.pools

    def route(self, plan: LayerPlan) -> tuple[str, str | None]:
        """Engine URL for a plan, and the plan for `vllm_xargs` where needed."""
        if plan.is_full:
            return self.engine, None
        return (self.pools[str(plan)], None) if self.pools else (self.engine, str(plan))

    @property
    def urls(self) -> list[str]:
        return [self.engine, *dict.fromkeys(self.pools.values())]

    def check(self) -> bool:
        """Check that the engine runs plans; returns whether it answered.

        An engine that runs plans refuses one that cannot be.

        Raises:
            UpstreamError: it does not refuse, and would answer every request in full.
        """
        if self.pools:
            return True
        try:
            models = httpx2.get(f"{self.engine}/v1/models", timeout=10, trust_env=False)
            name = models.json()["data"][0]["id"]
            body = {"model": name, "prompt": "a", "max_tokens": 1, XARGS: {KEY: "none"}}
            answer = httpx2.post(f"{self.engine}/v1/completions", json=body, timeout=60, trust_env=False)
        except (httpx2.HTTPError, ValueError, KeyError, IndexError, TypeError):
            return False
        if answer.status_code != 400 or KEY not in answer.text:
            raise UpstreamError(
                f"the engine at {self.engine} does not know {KEY}: install layerbudget-vllm there and start it with "
                "--worker-cls layerbudget_vllm.workers.PlannedCPUWorker, or name a pool for each plan (--pool)"
            )
        return True


class UpstreamCheck:
    """Asks repeatedly whether an engine runs plans, if it did not answer at first.

    Attributes:
        is_done: it does. Until then every request runs the full plan.
    """

    def __init__(self, upstreams: Upstreams, is_done: bool) -> None:
        self.is_done, self._upstreams, self._ended = is_done, upstreams, threading.Event()

    def start(self) -> None:
        threading.Thread(target=self._repeat, daemon=True).start()

    def end(self) -> None:
        self._ended.set()

    def _repeat(self) -> None:
        said = ""
        while not self.is_done and not self._ended.wait(1):
            try:
                self.is_done = self._upstreams.check()
            except UpstreamError as error:
                if said != (said := str(error)):
                    logger.error("%s; until then all requests run the full plan", error)


def _checked_url(url: str) -> str:
    try:
        parsed = httpx2.URL(url)
    except httpx2.InvalidURL:
        parsed = httpx2.URL("")
    rest = parsed.username or parsed.password or parsed.query or parsed.fragment  # errors name the address to clients
    if parsed.scheme not in ("http", "https") or not parsed.host or rest:
        raise UpstreamError(f"an engine's address looks like http://127.0.0.1:8000, got {url!r:.80}")
    return url.rstrip("/").removesuffix("/v1")


_RELAYED_HEADERS = ("content-type", "content-encoding")


class Engines:
    """Asks engines, and passes their answers back.

    Each request has a connection of its own, without cookies, accounts, redirects or proxies, so that nothing outlives
    it.

    Args:
        silence_s: longest silence of an engine.
        stopping: ends what waits for an engine.
        broken: called for each answer that breaks off after its begin.
    """

    def __init__(self, silence_s: float, stopping: ShutdownTimer, broken: Callable[[], None]) -> None:
        self._silence_s, self._stopping, self._broken = silence_s, stopping, broken
        self._transport = httpx2.AsyncHTTPTransport(trust_env=False, limits=httpx2.Limits(max_connections=None))

    async def close(self) -> None:
        await self._transport.aclose()

    async def ask(
        self, url: str, path: str, headers: dict[str, str], content: bytes | None = None, silence_s: float | None = None
    ) -> httpx2.Response:
        """Ask an engine; the body of its answer is still to be read. POST with content.

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
            raise engine_error(error, url) from None
        if 200 <= answer.status_code < 300 or 400 <= answer.status_code < 600:
            return answer
        await answer.aclose()
        raise RefusedError(502, f"the engine at {url} answered with status {answer.status_code}")

    async def relay(self, answer: httpx2.Response, url: str, headers: dict[str, str]) -> Response:
        """The answer for the client: events and long answers streamed, others whole.

        Raises:
            RefusedError: the engine breaks off in a short answer.
        """
        given = {name.lower().decode(): value.decode("latin-1") for name, value in answer.headers.raw}
        headers = {name: given[name] for name in _RELAYED_HEADERS if name in given} | headers
        chunks = answer.aiter_raw()
        if given.get("content-type", "").startswith("text/event-stream"):
            return _ClosingStream(answer, self._stream(chunks, url, b""), headers)
        held = b""
        try:
            async for chunk in chunks:
                held += chunk
                if len(held) > PLACE_BYTES:
                    return _ClosingStream(answer, self._stream(chunks, url, held), headers)
        except httpx2.HTTPError as error:
            await answer.aclose()
            raise engine_error(error, url) from None
        except BaseException:
            with anyio.CancelScope(shield=True):
                await answer.aclose()
            raise
        await answer.aclose()
        return Response(held, answer.status_code, headers)

    async def _stream(self, chunks: AsyncIterator[bytes], url: str, held: bytes) -> AsyncIterator[bytes]:
        """The held bytes and the rest; an error event if the engine breaks off."""
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
            yield error_events(error if isinstance(error, RefusedError) else engine_error(error, url))


class _ClosingStream(StreamingResponse):
    """A stream that closes its source in any case, so that the engine stops."""

    def __init__(self, answer: httpx2.Response, chunks: AsyncIterator[bytes], headers: dict[str, str]) -> None:
        super().__init__(chunks, answer.status_code, headers)
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            with anyio.CancelScope(shield=True):
                await self._answer.aclose()
