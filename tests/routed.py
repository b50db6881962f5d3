"""A router on a thread of this process, before an engine, with a tiny allocator that tells prompts apart by length."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import cache
from typing import Any

import httpx2
from fake_engine import FakeEngine, running, served
from tiny import padded_batch, tiny_model, tiny_tokenizer
from tiny_allocator import ByLength, make_allocator

from serving.router.app import make_app
from serving.router.engines import Upstreams
from serving.router.limits import Limits
from serving.router.record import PromptRecord
from serving.router.selector import RequestSelector
from serving.router.server import make_server

_batch = padded_batch()
PROMPTS = [row[kept.bool()].tolist() for row, kept in zip(_batch["input_ids"], _batch["attention_mask"], strict=True)]


@cache
def router_parts() -> tuple[Any, ...]:
    """Allocator, model, tokenizer, and the plans of `PROMPTS`."""
    model = tiny_model("llama")
    allocator = make_allocator(model, controller=ByLength(), name="by_length")
    return allocator, model, tiny_tokenizer(), allocator.allocate(model, **_batch)


@contextmanager
def routed(
    engine: FakeEngine | str,
    pools: Any = None,
    *,
    parts: Any = None,
    is_checked: bool = True,
    record: PromptRecord | None = None,
    **limits: Any,
) -> Iterator[httpx2.Client]:
    """A client of a router before an engine: a `FakeEngine`, or the URL of one, or of none."""
    allocator, model, tokenizer = (parts or router_parts())[:3]
    own = Limits(**{"decision_ms": 20_000.0, **limits})
    if isinstance(engine, str):
        upstreams = Upstreams(engine, pools or {})
        app = make_app(RequestSelector(allocator, model, tokenizer, own, record), upstreams, is_checked=is_checked)
        with running(make_server(app, own)) as url, httpx2.Client(base_url=url, timeout=30) as client:
            yield client
        return
    with (
        served(engine.app) as url,
        routed(url, pools, parts=parts, is_checked=is_checked, record=record, **asdict(own)) as client,
    ):
        yield client


def ask(client: httpx2.Client, prompt: Any, **more: Any) -> httpx2.Response:
    return client.post("/v1/completions", json={"model": "tiny", "prompt": prompt, **more})


def counted(client: httpx2.Client, name: str) -> dict[str, float]:
    lines = [line for line in client.get("/metrics").text.splitlines() if line.startswith(name)]
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}


def in_flight(client: httpx2.Client) -> float:
    return counted(client, "layerbudget_in_flight")["layerbudget_in_flight"]


def wait_for(holds: Callable[[], bool], seconds: float = 20) -> None:
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.02)


def connected(client: httpx2.Client, start: bytes = b"") -> socket.socket:
    """A connection to the router on which `start` is sent."""
    connection = socket.create_connection(("127.0.0.1", client.base_url.port), timeout=20)
    connection.sendall(start)
    return connection


def said(connection: socket.socket) -> bytes:
    """All that comes until the router closes."""
    with connection:
        return b"".join(iter(lambda: connection.recv(65536), b""))


def post(content: bytes, path: str = "/v1/completions", head: bytes = b"") -> bytes:
    """A request as bytes; `head` comes before the other headers."""
    start = f"POST {path} HTTP/1.1\r\n".encode() + head + b"host: a\r\nconnection: close\r\n"
    return start + b"content-length: %d\r\n\r\n" % len(content) + content


@contextmanager
def logged_tracebacks() -> Iterator[list[str]]:
    """What is logged with a traceback, from whatever logger."""
    found: list[str] = []

    class Noting(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            text = self.format(record)
            if "Traceback" in text or record.exc_info:
                found.append(text[-2000:])

    handler, loggers = Noting(), [logging.getLogger(name) for name in ("", "uvicorn")]
    for logger in loggers:
        logger.addHandler(handler)
    yield found
    for logger in loggers:
        logger.removeHandler(handler)
