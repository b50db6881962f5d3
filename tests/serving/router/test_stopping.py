"""SIGTERM: what is in flight is answered within a limit, what is on its way is answered, nothing is reset."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx2
from fake_engine import FakeEngine, raw_engine, running, served
from routed import connected, in_flight, logged_tracebacks, post, router_parts, said, wait_for

from serving.router.app import make_app
from serving.router.engines import Upstreams
from serving.router.limits import Limits
from serving.router.selector import RequestSelector
from serving.router.server import make_server

BODY = b'{"prompt": "ab"}'
EVENTS = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\ndata: one\n\n"


def test_garbage_is_collected_rarely_and_not_among_modules() -> None:
    code = """if True:
        import gc, json
        from serving.router.server import rarely_collect
        rarely_collect()
        seen = []
        gc.callbacks.append(lambda phase, info: seen.append(len(gc.get_objects())) if phase == "start" else None)
        body = json.loads("[" + "[]," * 200_000 + "[]]")
        assert 1 <= len(seen) <= 25, len(seen)
        assert seen[0] < 20_000, seen[0]"""
    subprocess.run([sys.executable, "-c", code], check=True)


@contextmanager
def stoppable(engine, **limits):
    """A client, and what stops its router as SIGTERM does; `running` fails where it does not end."""
    own = Limits(decision_ms=20_000, **limits)
    server = make_server(make_app(RequestSelector(*router_parts()[:3], own), Upstreams(engine)), own)
    with running(server) as url, httpx2.Client(base_url=url, timeout=30) as client, logged_tracebacks() as tracebacks:
        yield client, lambda: setattr(server, "should_exit", True)
    assert not tracebacks, tracebacks[0]


def test_requests_in_flight_and_on_their_way_are_answered() -> None:
    engine = FakeEngine()
    engine.silence = 1
    with served(engine.app) as url, stoppable(url) as (client, stop), ThreadPoolExecutor(4) as threads:
        idle = [connected(client) for _ in range(4)]
        half = [connected(client, post(BODY)[:place]) for place in (5, 60, len(post(BODY)) - 3)]
        flying = [threads.submit(client.post, "/v1/completions", content=BODY) for _ in range(4)]
        wait_for(lambda: in_flight(client) == 4)
        stop()
        for connection in idle:
            connection.sendall(post(BODY).replace(b"connection: close\r\n", b""))
        for connection, place in zip(half, (5, 60, len(post(BODY)) - 3), strict=True):
            connection.sendall(post(BODY)[place:])
        for one in flying:
            assert (one.result().status_code, one.result().headers["connection"].lower()) == (200, "close")
        for connection in [*idle, *half]:
            answer = said(connection)
            assert answer.startswith(b"HTTP/1.1 200 "), answer[:100]
            assert b"connection: close" in answer.lower()


def test_a_hung_engine_does_not_hold_the_router() -> None:
    """Neither does a stream that pauses, a body that never ends, or a client that reads nothing."""

    def answers(body):
        return [EVENTS, *[b"x" * 1_000_000] * 60 * (body["prompt"] == "flood")] if body["prompt"] != "hang" else []

    with raw_engine(answers, []) as engine, stoppable(engine, stop_s=0.5) as (client, stop):
        hanging, pausing, unread = (
            connected(client, post(json.dumps({"prompt": prompt}).encode())) for prompt in ("hang", "pause", "flood")
        )
        half = connected(client, post(BODY)[:-3])
        wait_for(lambda: in_flight(client) == 3)
        assert pausing.recv(1)
        assert unread.recv(1)
        stop()
        answers_ = {name: said(connection) for name, connection in (("hanging", hanging), ("half", half))}
        ended = said(pausing)
    for name, answer in answers_.items():
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 503 "), (name, answer[:200])
        assert json.loads(body)["error"]["message"] == "the router stops; send the request again"
    assert b"the router stops" in ended
    assert b"data: [DONE]" in ended
