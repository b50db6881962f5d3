"""One sender does not stop the others: half-sent, large and many requests, long prompts, silent connections."""

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from types import SimpleNamespace

import pytest
from fake_engine import FakeEngine
from routed import ask, connected, counted, in_flight, logged_tracebacks, post, routed, router_parts, said, wait_for

from serving.router import admission, requests, server
from serving.router.errors import RefusedError
from serving.router.limits import MOST_COMMAS, PLACE_BYTES, Limits
from serving.router.requests import CHARACTERS_A_TOKEN, RequestBody, least_tokens, parsed
from serving.router.selector import MOST_TOGETHER, MOST_TOKENS_TOGETHER, FairQueue, RequestSelector

HALF = post(b'{"prompt": "ab"}')[:-3]


def test_half_sent_bodies_take_no_place_and_end() -> None:
    engine = FakeEngine()
    with routed(engine, in_flight=4, client_s=1.0) as client:
        half = [connected(client, HALF) for _ in range(40)]
        assert [ask(client, "ab").status_code for _ in range(4)] == [200] * 4
        assert in_flight(client) == 0
        assert {said(connection).split()[1] for connection in half} == {b"408"}
    assert len(engine.bodies) == 4


@pytest.mark.parametrize("is_declared", [True, False])
def test_a_body_beyond_the_limit_is_refused(is_declared) -> None:
    content = b'{"prompt": "%s"}' % (b"a" * 20_000)
    chunked = post(b"").replace(b"content-length: 0", b"transfer-encoding: chunked")
    request = post(content) if is_declared else chunked + b"%x\r\n%s\r\n0\r\n\r\n" % (len(content), content)
    engine = FakeEngine()
    with routed(engine, body_bytes=10_000) as client:
        head, _, body = said(connected(client, request)).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 413 ")
    assert json.loads(body)["error"]["type"] == "invalid_request_error"
    assert not engine.bodies


def test_the_largest_unfinished_body_gives_way() -> None:
    """Bodies of all senders together are bounded, and those that have just begun are read."""
    limits = Limits(in_flight=2, body_bytes=PLACE_BYTES * 2)
    chunk = b"a" * (PLACE_BYTES // 2)

    async def scenario() -> list[object]:
        bodies = admission._Bodies(limits)
        senders = [asyncio.Queue() for _ in range(5)]
        reading = [asyncio.create_task(bodies.read({"headers": []}, queue.get)) for queue in senders]
        for chunks, queue in zip((2, 3, 2, 1), senders, strict=False):  # the fifth sends nothing yet
            for _ in range(chunks):
                queue.put_nowait({"type": "http.request", "body": chunk, "more_body": True})
        await asyncio.sleep(0.05)
        assert sum(one.bytes for one in bodies._unfinished) <= limits.unfinished_bytes
        for queue in senders:
            queue.put_nowait({"type": "http.request", "body": b"", "more_body": False})
        return await asyncio.gather(*reading, return_exceptions=True)

    found = asyncio.run(scenario())
    assert [len(one) if isinstance(one, bytes) else one.status for one in found] == [
        2 * len(chunk),
        429,
        2 * len(chunk),
        len(chunk),
        0,
    ]


def test_one_sender_takes_half_of_the_places_at_most() -> None:
    engine = FakeEngine()
    engine.silence = 1
    flood = {"authorization": "Bearer flood"}
    with routed(engine, in_flight=8) as client, ThreadPoolExecutor(24) as threads:
        body = {"prompt": "ab"}
        flooding = [threads.submit(client.post, "/v1/completions", json=body, headers=flood) for _ in range(20)]
        wait_for(lambda: in_flight(client) == 4)
        others = [threads.submit(client.post, "/v1/completions", json=body) for _ in range(3)]
        assert sorted(one.result().status_code for one in flooding) == [200] * 4 + [429] * 16
        assert [one.result().status_code for one in others] == [200] * 3


def test_a_large_body_takes_the_places_of_several() -> None:
    engine = FakeEngine()
    engine.silence = 1
    large = {"prompt": "ab", "user": "a" * (PLACE_BYTES * 3)}
    with routed(engine, in_flight=8) as client, ThreadPoolExecutor(3) as threads:
        found = [threads.submit(client.post, "/v1/completions", json=large) for _ in range(2)]
        assert sorted(one.result().status_code for one in found) == [200, 429]
        assert ask(client, "ab").status_code == 200


@pytest.mark.parametrize(
    "prompt",
    [
        "a" * 300,  # more than the model has positions
        [5] * 300,
        [[5]] * 60 + [[5] * 60],
        ["a"] * 60 + ["a" * 60],
        ["a"] * 5000,
        "a" * 2_000_000,
        [5] * 200_000,
    ],
)
def test_a_request_of_too_many_tokens_runs_in_full(prompt) -> None:
    with routed(FakeEngine()) as client, logged_tracebacks() as tracebacks:
        answer = ask(client, prompt)
        assert answer.headers["x-layer-plan"] == str(router_parts()[0].menu.plans[-1])
        assert 'because="long"' in client.get("/metrics").text
        assert not tracebacks


def test_a_text_that_is_certainly_too_long_is_not_tokenized() -> None:
    text = "a" * (CHARACTERS_A_TOKEN * 10)
    assert least_tokens(text, 10) == least_tokens([text[:-1]], 10) == least_tokens([{"content": text}], 10) == 10
    assert least_tokens(text + "a", 10) == 11
    assert least_tokens([5] * 11, 10) == least_tokens([[5]] * 11, 10) == 11


def test_decision_batches_are_bounded_and_long_ones_alone() -> None:
    allocator, model, tokenizer, _ = router_parts()

    async def groups(sent: list[tuple[str, int]]) -> list[list[int]]:
        chooser = RequestSelector(allocator, model, tokenizer)
        waiting = [asyncio.create_task(chooser.plan_for([[5] * length], sender)) for sender, length in sent]
        await asyncio.sleep(0)
        lengths = []
        while group := chooser._group():
            lengths.append([len(asked.prompts[0]) for asked in group])
        for one in waiting:
            one.cancel()
        return lengths

    most = MOST_TOKENS_TOGETHER
    assert asyncio.run(groups([("a", most + 1), *[("a", 1)] * (MOST_TOGETHER + 1), ("a", most + 2)])) == [
        [1] * MOST_TOGETHER,
        [1],
        [most + 1],
        [most + 2],
    ]
    assert asyncio.run(groups([("a", 9), ("a", most), ("a", 8)])) == [[9], [most], [8]]
    assert asyncio.run(groups([*[("flood", 2)] * 20, ("a", 3), ("b", 4)]))[0][:3] == [2, 3, 4]


def test_each_sender_has_its_turn() -> None:
    turns: FairQueue[str] = FairQueue()
    for item in ("a1", "a2", "a3", "b1", "c1", "c2"):
        turns.put(item[0], item)
    taken = []
    while turns:
        taken.append(turns.take())
    assert taken == ["a1", "b1", "c1", "a2", "c2", "a3"]


def test_silent_connections_are_cut_and_newcomers_served(monkeypatch) -> None:
    monkeypatch.setattr(server, "MOST_UNFINISHED", 4)
    with routed(FakeEngine(), client_s=1.0) as client:
        silent = [connected(client, start) for start in (b"", b"POST /v1/comp", b"GET /health HTTP/1.1\r\nx: ") * 3]
        assert ask(client, "ab").status_code == 200
        for connection in silent:
            with suppress(ConnectionResetError):
                assert said(connection) == b""


@pytest.mark.parametrize(
    ("body", "plan", "sent"),
    [
        ({}, None, {}),
        ({}, "0-2", {"vllm_xargs": {"layer_plan": "0-2"}}),
        ({"vllm_xargs": None}, None, {}),
        ({"vllm_xargs": {"a": 1}, "prompt": "é"}, None, {"vllm_xargs": {"a": 1}, "prompt": "é"}),
        ({"a": 1, "vllm_xargs": {"b": 1}}, "0-2", {"a": 1, "vllm_xargs": {"b": 1, "layer_plan": "0-2"}}),
    ],
)
def test_a_body_goes_on_with_the_plan_and_all_else(body, plan, sent) -> None:
    assert json.loads(RequestBody.of(body).with_plan(plan)) == sent


def test_a_client_does_not_choose_the_plan() -> None:
    for plan in ('"0-2"', "null", "1"):
        with pytest.raises(RefusedError, match="layer_plan is chosen by the router"):
            parsed(b'{"prompt": "ab", "vllm_xargs": {"layer_plan": %s}}' % plan.encode())


@pytest.mark.parametrize(("values", "status"), [(MOST_COMMAS + 1, 400), (MOST_COMMAS + 2, 413)])
def test_a_body_of_too_many_values_is_not_parsed(values, status) -> None:
    engine = FakeEngine()
    with routed(engine) as client:
        answer = client.post("/v1/completions", content=b"[%s]" % b",".join([b"1"] * values))
        assert (answer.status_code, "commas" in answer.text) == (status, status == 413)
    assert not engine.bodies


def test_a_burst_of_large_bodies_is_parsed_with_rests_between(monkeypatch) -> None:
    """Nine times as long as each took, also where they wait in line, so that parsing leaves the process to others."""
    done, now = [], [10.0]
    clock = SimpleNamespace(perf_counter=lambda: now[0], sleep=lambda seconds: now.__setitem__(0, now[0] + seconds))
    monkeypatch.setattr(requests, "time", clock)

    def parse(fields, body) -> None:
        done.append((len(fields["prompt"]) > PLACE_BYTES, now[0]))
        now[0] += 0.5  # what it takes

    async def scenario() -> None:
        threads = requests.BodyThreads()
        large, small = ([b'{"prompt": "%s"}' % (b"a" * size)] for size in (2 * PLACE_BYTES, 10))
        await asyncio.gather(*(threads.read(large.copy(), parse) for _ in range(3)))
        await threads.read(small.copy(), parse)
        threads.close()

    asyncio.run(scenario())
    assert [when for is_large, when in done if is_large] == [10.0, 15.0, 20.0]
    assert done[-1] == (False, 20.5)


def test_refusals_are_counted() -> None:
    with routed(FakeEngine(), body_bytes=1000) as client:
        ask(client, "a" * 2000)
        client.post("/v1/completions", content=b"[")
        found = counted(client, "layerbudget_answers_total")
    assert found == {f'layerbudget_answers_total{{status="{status}"}}': 1 for status in (413, 400)}
