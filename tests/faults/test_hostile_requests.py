"""A router with clients, and beside them stalled ones, huge ones and a flood; and a router that is told to stop.

The short form counts answers. The long one has 64 clients and the router in a process of its own, and measures times
and memory.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from fake_engine import served
from routed import PROMPTS, logged_tracebacks, routed, wait_for
from selection import LONG
from tiny import tiny_model, tiny_tokenizer
from tiny_allocator import make_allocator
from troublemaker import BODIES, trouble

CLIENTS, REQUESTS, FLOOD = (64, 40, 40) if LONG else (8, 2, 10)
EXPECTED = {"nested 413", *(f"{name} {status}" for name in BODIES for status in (200, 429))}


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """An engine that answers with the user that it was asked for, and keeps nothing."""
    message = {"more_body": True}
    content = b""
    while message.get("more_body"):
        message = await receive()
        content += message.get("body", b"")
    user = re.search(rb'"user":"(\d+)"', content[:1000])
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": user[1] if user else b""})


@pytest.fixture(scope="module")
def allocator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("routed")
    model = tiny_model("llama")
    model.save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    make_allocator(model).save_pretrained(folder / "allocator")
    return folder


@contextmanager
def router_process(folder: Path, upstream: str) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A router and its URL; no traceback may be in its log at the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["--allocator", folder / "allocator", "--model", folder / "model", "--upstream", upstream, "--port", port]
    command = [sys.executable, "-m", "layerbudget", "serve", *map(str, words)]
    environment = {**os.environ, "LAYERBUDGET_CACHE": str(folder)}
    log = folder / f"{port}.log"
    with log.open("wb") as file, subprocess.Popen(command, stderr=file, env=environment) as process:
        try:
            url = f"http://127.0.0.1:{port}"
            wait_for(lambda: _is_well(url), 120)
            yield process, url
            process.terminate()
            process.wait(60)
        finally:
            process.kill()
    assert "Traceback" not in log.read_text()


def _is_well(url: str) -> bool:
    try:
        return httpx2.get(f"{url}/health").status_code == 200
    except httpx2.HTTPError:
        return False


def served_times(url: httpx2.URL | str) -> list[float]:
    """Seconds of each request of all clients; each client gets its own answer."""

    def one_client(number: int) -> list[float]:
        found = []
        with httpx2.Client(base_url=url, timeout=60) as own:
            for _ in range(REQUESTS):
                start = time.monotonic()
                body, key = {"user": str(number), "prompt": PROMPTS[number % 4]}, {"authorization": str(number)}
                answer = own.post("/v1/completions", json=body, headers=key)
                assert (answer.status_code, answer.text) == (200, str(number))
                found.append(time.monotonic() - start)
        return found

    with ThreadPoolExecutor(CLIENTS) as threads:
        return sorted(second for times in threads.map(one_client, range(CLIENTS)) for second in times)


@pytest.mark.skipif(LONG, reason="the long form is below")
def test_others_are_served_beside_stalled_huge_and_flood(record_property: Callable[[str, Any], None]) -> None:
    with served(echo) as upstream, routed(upstream) as client, logged_tracebacks() as tracebacks:
        with trouble(int(client.base_url.port or 0), FLOOD) as seen:
            assert len(served_times(client.base_url)) == CLIENTS * REQUESTS
        assert not tracebacks, tracebacks[0]
    assert set(seen) <= EXPECTED, seen
    record_property("counted", "routers beside stalled, huge and flooding clients")


@pytest.mark.skipif(not LONG, reason="measures; make faults")
def test_others_are_served_in_time_and_memory_is_bounded(allocator: Path) -> None:
    with served(echo) as upstream, router_process(allocator, upstream) as (process, url):
        alone, before = served_times(url), _peak_mib(process)
        with trouble(int(url.rpartition(":")[2]), FLOOD) as seen:
            beside = served_times(url)
        grown = _peak_mib(process) - before
    assert set(seen) <= EXPECTED, seen
    assert grown < 500, f"{grown} MiB more"  # docs/serving.md
    last = [times[int(0.95 * len(times))] for times in (alone, beside)]
    assert last[1] < 2 * last[0], f"p95 {last[1]:.3f} s, alone {last[0]:.3f} s"


def _peak_mib(process: subprocess.Popen[bytes]) -> float:
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) / 1024


@pytest.mark.skipif(not LONG, reason="starts processes; make faults")
@pytest.mark.parametrize("number", range(6))
def test_a_stopped_process_resets_no_request(allocator: Path, number: int) -> None:
    """Each request is answered, or its connection was refused."""
    seen = Counter[str]()
    with (
        served(echo) as upstream,
        router_process(allocator, upstream) as (process, url),
        ThreadPoolExecutor(16) as threads,
    ):
        running = [threads.submit(_asking, url, seen) for _ in range(16)]
        wait_for(lambda: seen["200"] > 100 + 7 * number, 60)
        process.send_signal(signal.SIGTERM)
        for one in running:
            one.result()
    assert set(seen) == {"200", "ConnectError"}, seen


def _asking(url: str, seen: Counter[str]) -> None:
    """Requests on connections of their own, until one is refused."""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        try:
            seen[str(httpx2.post(f"{url}/v1/completions", json={"prompt": [5] * 8}, timeout=30).status_code)] += 1
        except httpx2.HTTPError as error:
            seen[type(error).__name__] += 1
            return
