"""A process that troubles a router: half-sent bodies, silent connections, huge bodies and a flood."""

from __future__ import annotations

import multiprocessing
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Event

import httpx2

HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: a\r\n"
STALLED = (b"", HEAD, HEAD + b'content-length: 99\r\n\r\n{"prompt"')
BODIES = {
    "nested": b'{"prompt": "ab", "a": [' + b"[]," * 1_300_000 + b"1]}",
    "values": b'{"prompt": "ab", "a": [' + b"[]," * 260_000 + b'"%s"]}' % (b"ab " * 1_000_000),
    "text": b'{"prompt": "%s"}' % (b"a b " * 900_000),
    "flood": b'{"prompt": "ab"}',
}


@contextmanager
def trouble(port: int, flood: int) -> Iterator[Counter[str]]:
    """The statuses of its answers, which are there at the end."""
    context, seen = multiprocessing.get_context("spawn"), Counter[str]()
    begun, ended, results = context.Event(), context.Event(), context.Queue()
    process = context.Process(target=_send, args=(port, flood, begun, ended, results), daemon=True)
    process.start()
    try:
        assert begun.wait(60), "no request of the flood was answered"
        yield seen
    finally:
        ended.set()
        seen.update(results.get(timeout=60))
        process.join(60)


def _send(port: int, flood: int, begun: Event, ended: Event, results: Queue[Counter[str]]) -> None:
    seen = Counter[str]()
    stalled = [socket.create_connection(("127.0.0.1", port)) for _ in range(300)]
    for number, connection in enumerate(stalled):
        connection.sendall(STALLED[number % len(STALLED)])

    def sending(name: str) -> None:
        with httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            while not ended.is_set():
                try:
                    answer = client.post("/v1/completions", content=BODIES[name], headers={"authorization": name})
                    seen[f"{name} {answer.status_code}"] += 1
                except httpx2.HTTPError as error:
                    seen[f"{name} {type(error).__name__}"] += 1
                if name == "flood":
                    begun.set()

    threads = [
        threading.Thread(target=sending, args=(name,)) for name in ("nested", "values", "text", *["flood"] * flood)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    results.put(seen)
