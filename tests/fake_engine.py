"""A server that speaks like an engine, for tests of what stands before one; and servers on threads of this process."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse


class FakeEngine:
    """Answers with what it was asked; `bodies` keeps that.

    Attributes:
        knows_plans: refuses a plan that cannot be, as an engine with layerbudget-vllm does.
        breaks: streams break off after the first event.
        silence: seconds before an answer.
        left: clients that went away during the silence.
    """

    def __init__(self, *, knows_plans: bool = True) -> None:
        self.knows_plans, self.breaks, self.silence, self.left = knows_plans, False, 0.0, 0
        self.bodies: list[dict[str, Any]] = []
        self.app = FastAPI()
        for path in ("/v1/completions", "/v1/chat/completions"):
            self.app.add_api_route(path, self._answer, methods=["POST"])
        self.app.add_api_route("/v1/models", self._models)
        self.app.add_api_route("/health", lambda: Response())

    def _models(self) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": "tiny"}]})

    async def _answer(self, request: Request) -> Response:
        body = await request.json()
        plan = (body.get("vllm_xargs") or {}).get("layer_plan")
        if self.knows_plans and plan == "none":
            return JSONResponse({"error": {"message": "layer_plan: cannot read 'none'", "code": 400}}, 400)
        self.bodies.append(body)
        waited = time.monotonic()
        while time.monotonic() - waited < self.silence:
            if await request.is_disconnected():
                self.left += 1
                return Response()
            await asyncio.sleep(0.02)
        if body.get("stream"):
            return StreamingResponse(self._events(), media_type="text/event-stream")
        return JSONResponse({"choices": [{"text": "said"}], "plan": plan})

    async def _events(self) -> Any:
        for word in ("one", "two"):
            yield f"data: {json.dumps({'choices': [{'text': word}]})}\n\n"
            await asyncio.sleep(0.05)
            if self.breaks:
                raise RuntimeError("the engine dies")
        yield "data: [DONE]\n\n"


@contextmanager
def served(app: Any) -> Iterator[str]:
    """The URL of an ASGI application on a free port."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        if not thread.is_alive():
            raise RuntimeError("the server did not start")
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = server.force_exit = True
        thread.join(timeout=10)
