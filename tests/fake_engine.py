"""A server that speaks like an engine, for tests of what stands before one; and servers on threads of this process."""

from __future__ import annotations

import asyncio
import json
import re
import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import takewhile
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse


class FakeEngine:
    """Answers with what it was asked; `bodies` and `headers` keep that.

    Attributes:
        knows_plans: refuses a plan that cannot be, as an engine with layerbudget-vllm does.
        breaks: streams break off after the first event.
        silence: seconds before an answer.
        left: clients that went away during the silence.
    """

    def __init__(self, *, knows_plans: bool = True) -> None:
        self.knows_plans, self.breaks, self.silence, self.left = knows_plans, False, 0.0, 0
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.app = FastAPI()
        for path in ("/v1/completions", "/v1/chat/completions"):
            self.app.add_api_route(path, self._answer, methods=["POST"])
        self.app.add_api_route("/v1/models", self._models)
        self.app.add_api_route("/health", lambda: Response())

    def _models(self) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": "tiny"}]})

    async def _answer(self, request: Request) -> Response:
        body = await request.json()
        self.headers.append(dict(request.headers))
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
        return JSONResponse({"choices": [{"text": "said"}], "plan": plan, "user": body.get("user")})

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
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical", lifespan="off"))
    server.force_exit = True
    with running(server) as url:
        yield url


@contextmanager
def running(server: uvicorn.Server) -> Iterator[str]:
    """The URL of a server on a thread of this process."""
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
        server.should_exit = True
        thread.join(timeout=20)
        if thread.is_alive() and not server.force_exit:
            raise RuntimeError("the server did not end")


@contextmanager
def raw_engine(answers: Callable[[dict[str, Any]], list[bytes]], heads: list[str]) -> Iterator[str]:
    """The URL of an engine that answers each request with bytes, whatever they are.

    Args:
        answers: from a request's body to what is sent, a moment after one another; then the connection stays open.
        heads: gets the head of each request.
    """

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            with suppress(OSError):
                while line := self.rfile.readline():
                    lines = [line, *takewhile(lambda one: one.strip(), self.rfile)]
                    heads.append(head := b"".join(lines).decode("latin-1"))
                    size = re.search(r"content-length: (\d+)", head, re.IGNORECASE)
                    for place, piece in enumerate(answers(json.loads(self.rfile.read(int(size[1]))) if size else {})):
                        time.sleep(0.02 * bool(place))
                        self.wfile.write(piece)

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads, allow_reuse_address = True, True

    with Server(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
