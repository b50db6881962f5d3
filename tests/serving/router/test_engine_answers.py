"""Engines that set cookies, mix, repeat and break off: no client gets another's bytes."""

import json
import time
from concurrent.futures import ThreadPoolExecutor

import httpx2
from fake_engine import raw_engine
from routed import ask, connected, counted, in_flight, logged_tracebacks, post, routed, wait_for

STRAY = "of-somebody-else"
OK = "HTTP/1.1 200 OK\r\n"


def whole(own: str, status: str = OK, more: str = "") -> bytes:
    content = json.dumps({"choices": [{"text": own}]})
    return f"{status}{more}content-length: {len(content)}\r\n\r\n{content}".encode()


def _chunked(own: str, end: str = "0\r\n\r\n") -> bytes:
    return f"{OK}transfer-encoding: chunked\r\n\r\n{len(own):x}\r\n{own}\r\n{end}".encode()


SECOND = whole(STRAY)
GOOD = {
    "cookie": lambda own: [whole(own, more=f"set-cookie: session={STRAY}\r\n")],
    "cookie for all paths": lambda own: [whole(own, more=f"set-cookie: s={STRAY}; Path=/; Domain=127.0.0.1\r\n")],
    "old cookie": lambda own: [whole(own, more=f"set-cookie2: s={STRAY}; Version=1\r\n")],
    "challenge": lambda own: [whole(own, "HTTP/1.1 401 No\r\n", "www-authenticate: Basic realm=a\r\n")],
    "two answers": lambda own: [whole(own) + SECOND],
    "two answers apart": lambda own: [whole(own), SECOND],
    "three answers apart": lambda own: [whole(own), SECOND, SECOND],
    "two chunked answers": lambda own: [_chunked(own), _chunked(STRAY)],
    "second answer cut": lambda own: [whole(own), SECOND[:30]],
    "bytes after the end": lambda own: [whole(own) + STRAY.encode()],
    "keeps alive": lambda own: [whole(own, more="connection: keep-alive\r\nkeep-alive: timeout=600\r\n"), SECOND],
    "hints before": lambda own: [b"HTTP/1.1 103 Early\r\nlink: a\r\n\r\n", whole(own)],
    "trailers": lambda own: [_chunked(own, f"0\r\nset-cookie: a={STRAY}\r\n\r\n")],
    "type that is not ASCII": lambda own: [whole(own, more="content-type: text/é\r\n")],
    "in small pieces": lambda own: [whole(own)[:9], whole(own)[9:30], whole(own)[30:]],
}
BAD = {
    "redirect": lambda own: [whole(own, "HTTP/1.1 307 T\r\n", "location: /v1/models\r\n")],
    "redirect elsewhere": lambda own: [whole(own, "HTTP/1.1 302 F\r\n", "location: http://127.0.0.1:9/\r\n")],
    "other protocol": lambda own: [b"HTTP/1.1 101 S\r\nupgrade: a\r\nconnection: upgrade\r\n\r\n" + SECOND],
    "status 999": lambda own: [whole(own, "HTTP/1.1 999 What\r\n")],
    "status in words": lambda own: [b"HTTP/1.1 good OK\r\n\r\n"],
    "no HTTP": lambda own: [b"good day\r\n\r\n"],
    "head of 300 kB": lambda own: [whole(own, more=f"x: {'a' * 300_000}\r\n")],
    "bad chunk": lambda own: [f"{OK}transfer-encoding: chunked\r\n\r\nzz\r\n{STRAY}".encode()],
    "two lengths": lambda own: [whole(own, more="content-length: 7\r\n")],
    "zero in a header": lambda own: [whole(own, more="x: \0\r\n")],
    "silence": lambda own: [],
    "half an answer": lambda own: [whole(own)[:-5]],
    "silence after hints": lambda own: [b"HTTP/1.1 102 P\r\n\r\n"],
}


def test_two_clients_get_their_own_answers_only() -> None:
    kinds, heads, wrong = {**GOOD, **BAD}, [], {}
    with (
        raw_engine(lambda body: kinds[body["kind"]](body["prompt"]), heads) as engine,
        routed(engine, engine_s=0.3) as client,
        httpx2.Client(base_url=client.base_url) as other,
        ThreadPoolExecutor(2) as threads,
        logged_tracebacks() as tracebacks,
    ):

        def several(asking):
            own, headers = ("aaa", {"authorization": "Bearer aaa"}) if asking is client else ("bbb", {})
            return [
                (kind, own, asking.post("/v1/completions", json={"prompt": own, "kind": kind}, headers=headers))
                for kind in kinds
                for _ in range(1 if "silence" in kind else 4)
            ]

        found = [one for answers in threads.map(several, (client, other)) for one in answers]
    for kind, own, answer in found:
        got = answer.status_code, own in answer.text, STRAY in answer.text + str(answer.headers)
        if got not in (
            ((200, True, False), (401, True, False)) if kind in GOOD else ((502, False, False), (504, False, False))
        ):
            wrong[kind] = got
    assert not wrong
    assert len(heads) == len(found)
    assert not [head for head in heads if "cookie" in head.lower()]
    assert sum("authorization" in head.lower() for head in heads) == len(found) / 2  # the other client has none
    assert not tracebacks, tracebacks[0]


def test_a_long_answer_passes_and_says_when_it_breaks_off() -> None:
    text, head = "x" * 600_000, f"{OK}content-length: 600000\r\n\r\n"
    for sent, breaks in ((text, False), (text[:400_000], True)):
        with (
            raw_engine(lambda body, sent=sent: [(head + sent).encode()], []) as engine,
            routed(engine, engine_s=0.3) as client,
        ):
            answer = ask(client, "ab")
            assert answer.text.startswith(sent)
            assert ("silent for too long" in answer.text) == breaks
            assert counted(client, "layerbudget_broken_streams_total") == {
                "layerbudget_broken_streams_total": float(breaks)
            }


def test_a_client_that_reads_nothing_is_cut_off() -> None:
    """Of an answer without an end the router holds what the buffers hold, and no longer than its limit."""
    endless = [f"{OK}content-type: text/event-stream\r\n\r\n".encode(), *[b"x" * 1_000_000] * 60]
    with (
        raw_engine(lambda body: endless, []) as engine,
        routed(engine, client_s=0.5) as client,
        connected(client, post(b'{"prompt": "ab"}')),
    ):
        wait_for(lambda: in_flight(client) == 1)
        wait_for(lambda: in_flight(client) == 0)


def test_many_who_ask_for_health_ask_the_engine_once() -> None:
    asked: list[str] = []
    slow = raw_engine(lambda body: time.sleep(1) or [whole("well")], asked)
    with slow as engine, routed(engine) as client, ThreadPoolExecutor(20) as threads:
        assert {one.status_code for one in threads.map(lambda _: client.get("/health"), range(20))} == {200}
    assert len(asked) < 5
