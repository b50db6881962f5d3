"""The OpenAI routes, answered on this machine: requests that wait are generated together, each under its own plan."""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from backbone.errors import InputError
from runtime.allocator import Allocator
from runtime.offline import AllocatedText, finished_texts
from serving.router.admission import Admission
from serving.router.app import CHAT, COMPLETIONS, PLAN_HEADER, cancelled_on_disconnect, not_found
from serving.router.errors import RefusedError
from serving.router.limits import Limits, ShutdownTimer
from serving.router.metrics import Metrics
from serving.router.record import PromptRecord
from serving.router.requests import BodyThreads, LongPromptError, PromptReader, positions_of
from serving.router.selector import Choice, Prompts

logger = logging.getLogger(__name__)

IGNORED = {"model", "user", "metadata", "store", "stream", "stream_options", "prompt", "messages"}
"""Fields that change no token of an answer, or that are read elsewhere."""
NEUTRAL: dict[str, tuple[object, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logprobs": (False, 0),
}
"""Fields that are taken with these values alone."""


@dataclass(frozen=True, slots=True)
class LocalRequest:
    """What a request asks.

    Attributes:
        prompts: tokens of each.
        options: arguments of `generate()`.
        is_stream: the answer comes as an event.
    """

    prompts: Prompts
    options: dict[str, Any]
    is_stream: bool


@dataclass(eq=False, slots=True)
class _Waiting:
    """A request, and who waits for its texts."""

    request: LocalRequest
    texts: asyncio.Future[list[AllocatedText]] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )


class LocalEngine:
    """Generates for requests in one thread, those that wait with equal options as one set.

    Args:
        allocator: chooses each prompt's plan; its decoding holds where a request names none.
        model: what answers.
        tokenizer: of the model. The thread that generates only decodes with it; see `PromptReader` for the rest.
        record: keeps a share of the prompts; None for none.
        batch_size: prompts generated together, at most.
    """

    def __init__(
        self,
        allocator: Allocator,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        record: PromptRecord | None = None,
        batch_size: int = 8,
    ) -> None:
        self.allocator, self.model, self.tokenizer, self._batch_size = allocator, model, tokenizer, batch_size
        # The first call may change the tokenizer's settings, which must not happen while a thread decodes.
        tokenizer("a")
        offer = None if record is None else record.offer
        self.reader, self.positions = PromptReader.of(allocator, model, tokenizer, offer), positions_of(model)
        self._record = record
        self._waiting: list[_Waiting] = []
        self._some = asyncio.Event()
        self._thread, self._is_closed = ThreadPoolExecutor(1, "layerbudget-generate"), False

    async def texts_of(self, request: LocalRequest) -> list[AllocatedText]:
        """The texts of its prompts; raises what generating them raised."""
        asked = _Waiting(request)
        self._waiting.append(asked)
        self._some.set()
        return await asked.texts

    async def serve(self) -> None:
        """Generate as long as it is not cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            await self._some.wait()
            self._waiting = [asked for asked in self._waiting if not asked.texts.done()]
            if not self._waiting:
                self._some.clear()
                continue
            group = self._next_group()
            try:
                texts = iter(await loop.run_in_executor(self._thread, self._generated, group))
            except Exception as error:
                for asked in group:
                    if not asked.texts.done():
                        asked.texts.set_exception(error)
                continue
            for asked in group:
                own = [next(texts) for _ in asked.request.prompts]
                if not asked.texts.done():
                    asked.texts.set_result(own)

    def _next_group(self) -> list[_Waiting]:
        """The first request, and later ones like it as far as one batch holds them."""
        options, size = self._waiting[0].request.options, 0
        group: list[_Waiting] = []
        for asked in self._waiting:
            count = len(asked.request.prompts)
            if asked.request.options == options and (not group or size + count <= self._batch_size):
                group.append(asked)
                size += count
        self._waiting = [asked for asked in self._waiting if asked not in group]
        return group

    def _generated(self, group: list[_Waiting]) -> list[AllocatedText]:
        prompts, texts = [prompt for asked in group for prompt in asked.request.prompts], dict[int, AllocatedText]()
        parts, options = (self.allocator, self.model, self.tokenizer), group[0].request.options
        for batch in finished_texts(*parts, prompts, batch_size=self._batch_size, **options):
            if self._is_closed:
                raise RuntimeError("the server stopped")
            texts.update(batch)
        return [texts[index] for index in range(len(prompts))]

    def close(self) -> None:
        """End the thread that generates, after the batch that it is at."""
        self._is_closed = True
        self._thread.shutdown(wait=False, cancel_futures=True)
        if self._record is not None:
            self._record.close()


def make_local_app(engine: LocalEngine, limits: Limits) -> FastAPI:
    """Completions, chat, models, health and metrics as an ASGI application."""
    stopping, metrics = ShutdownTimer(), Metrics(engine.allocator.menu.n_layers)
    routes = _Routes(engine, limits, metrics, stopping)

    @asynccontextmanager
    async def running(app: FastAPI) -> AsyncIterator[None]:
        generating = asyncio.create_task(engine.serve())
        try:
            yield
        finally:
            generating.cancel()
            routes.bodies.close()
            engine.close()

    app = FastAPI(lifespan=running, docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    app.state.stopping = stopping
    app.add_middleware(Admission, metrics=metrics, limits=limits, stopping=stopping)
    app.add_exception_handler(HTTPException, not_found)
    for path in (COMPLETIONS, CHAT):
        app.add_api_route(path, routes.answer, methods=["POST"])
    app.add_api_route("/v1/models", routes.models, methods=["GET"])
    app.add_api_route("/health", lambda: Response(), methods=["GET"])
    app.add_api_route("/metrics", routes.metrics_page, methods=["GET"])
    return app


class _Routes:
    def __init__(self, engine: LocalEngine, limits: Limits, metrics: Metrics, stopping: ShutdownTimer) -> None:
        self._engine, self._limits, self._metrics, self._stopping = engine, limits, metrics, stopping
        self.bodies = BodyThreads()

    async def models(self) -> Response:
        name = self._engine.allocator.model_source
        return JSONResponse({"object": "list", "data": [{"id": name, "object": "model", "owned_by": "layerbudget"}]})

    async def metrics_page(self) -> Response:
        drift = self._engine.allocator.drift
        page = self._metrics.page(drift=drift is not None and drift.triggered)
        return Response(page, media_type="text/plain; version=0.0.4")

    async def answer(self, request: Request) -> Response:
        start, content = time.perf_counter(), [chunk async for chunk in request.stream()]
        return await cancelled_on_disconnect(request, self._answer(content, start, request.scope["path"] == CHAT))

    async def _answer(self, content: list[bytes], start: float, chat: bool) -> Response:
        try:
            async with self._stopping.limited():
                asked = await self.bodies.read(content, lambda body, _: self._asked(chat, body))
                texts = await self._engine.texts_of(asked)
        except InputError as error:
            raise RefusedError(400, str(error)) from None
        tokens = sum(map(len, asked.prompts))
        seconds = time.perf_counter() - start
        plans = ", ".join(dict.fromkeys(str(one.plan) for one in texts))
        for one in texts:
            self._metrics.chosen(Choice(one.plan))
        self._metrics.first_byte.observe(seconds)
        logger.info("prompts: %d, tokens: %d, plan: %s, %.0f ms", len(texts), tokens, plans, seconds * 1000)
        answer = self._described(texts, tokens, asked.options, chat)
        if asked.is_stream:
            return Response(_events(answer, chat), media_type="text/event-stream", headers={PLAN_HEADER: plans})
        return JSONResponse(answer, headers={PLAN_HEADER: plans})

    def _asked(self, chat: bool, body: dict[str, Any]) -> LocalRequest:
        """What a body asks. Raises RefusedError or InputError for what cannot be served."""
        options = _options(body)
        new = options.get("max_new_tokens", self._engine.allocator.decoding.max_new_tokens)
        most = min(self._limits.decision_tokens, self._engine.positions - new)
        if most < 1:
            raise RefusedError(400, f"max_tokens should be less than the model's {self._engine.positions}, got {new}")
        try:
            prompts = self._engine.reader.prompts_of(body, chat=chat, most_tokens=most)
        except LongPromptError as error:
            raise RefusedError(400, f"{error}, the most beside {new} new ones") from None
        return LocalRequest(prompts, options, bool(body.get("stream")))

    def _described(
        self, texts: list[AllocatedText], n_prompt: int, options: dict[str, Any], chat: bool
    ) -> dict[str, Any]:
        engine, choices, n_new = self._engine, [], 0
        most = options.get("max_new_tokens", engine.allocator.decoding.max_new_tokens)
        for index, one in enumerate(texts):
            text = _cut(one.text, options.get("stop_strings", []))
            n_new += one.tokens
            said = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
            choices.append({"index": index, **said, "finish_reason": "length" if one.tokens >= most else "stop"})
        return {
            "id": f"layerbudget-{uuid.uuid4().hex}",
            "object": "chat.completion" if chat else "text_completion",
            "created": int(time.time()),
            "model": engine.allocator.model_source,
            "choices": choices,
            "usage": {"prompt_tokens": n_prompt, "completion_tokens": n_new, "total_tokens": n_prompt + n_new},
        }


def _options(body: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `generate()` that a request names. Raises RefusedError for a field that cannot be served."""
    options: dict[str, Any] = {}
    for name, value in body.items():
        if value is None or name in IGNORED or value in NEUTRAL.get(name, ()):
            continue
        if name in ("max_tokens", "max_completion_tokens"):
            options["max_new_tokens"] = _checked(name, value, int, 1, 2**20)
        elif name == "temperature":
            if _checked(name, value, (int, float), 0, 2) > 0:
                options |= {"do_sample": True, "temperature": float(value)}
        elif name == "top_p":
            options["top_p"] = float(_checked(name, value, (int, float), 0, 1))
        elif name == "stop":
            stops = [value] if isinstance(value, str) else value
            if not isinstance(stops, list) or not stops or not all(isinstance(one, str) and one for one in stops):
                raise RefusedError(400, f"stop should be a text or a list of texts, got {value!r:.80}")
            options["stop_strings"] = stops
        else:
            raise RefusedError(400, f"{name} is not served here, got {value!r:.80}; leave it out")
    if not options.get("do_sample"):
        options.pop("top_p", None)
    return options


def _checked(name: str, value: Any, kind: Any, low: float, high: float) -> Any:
    if isinstance(value, bool) or not isinstance(value, kind) or not low <= value <= high:
        raise RefusedError(400, f"{name} should be a number from {low} to {high}, got {value!r:.80}")
    return value


def _cut(text: str, stops: list[str]) -> str:
    return text[: min((place for stop in stops if (place := text.find(stop)) >= 0), default=len(text))]


def _events(answer: dict[str, Any], chat: bool) -> bytes:
    """The whole answer as one event of a stream."""
    if chat:
        choices = [{**one, "delta": one["message"]} for one in answer["choices"]]
        choices = [{key: value for key, value in one.items() if key != "message"} for one in choices]
        answer = {**answer, "object": "chat.completion.chunk", "choices": choices}
    return f"data: {json.dumps(answer)}\n\ndata: [DONE]\n\n".encode()
