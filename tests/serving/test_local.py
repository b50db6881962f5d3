"""The OpenAI routes of one process: answers are those of the allocator, waiting requests share a batch."""

from __future__ import annotations

import json
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx2
import pytest
from fake_engine import running
from routed import counted
from tiny import tiny_model, tiny_tokenizer
from tiny_allocator import ByLength, make_allocator

import serving.local
from serving.local import LocalEngine, make_local_app
from serving.router.limits import Limits
from serving.router.server import make_server

PROMPTS = ["a", "the cat sat", "one two three four five six"]


@pytest.fixture(scope="module")
def engine():
    model = tiny_model("llama")
    return make_allocator(model, controller=ByLength(), name="by_length"), model, tiny_tokenizer()


@contextmanager
def client_of(engine, **limits):
    own = Limits(**limits)
    app = make_local_app(LocalEngine(*engine), own)
    with running(make_server(app, own)) as url, httpx2.Client(base_url=url, timeout=60) as client:
        yield client


def test_answers_are_those_of_the_allocator(engine) -> None:
    allocator, model, tokenizer = engine
    expected = allocator.generate_many(model, tokenizer, PROMPTS, raw=True, max_new_tokens=4)
    with client_of(engine) as client, ThreadPoolExecutor(3) as threads:

        def ask(prompt):
            return client.post("/v1/completions", json={"model": "tiny", "prompt": prompt, "max_tokens": 4})

        answers = list(threads.map(ask, PROMPTS))
        together = ask(PROMPTS).json()
        assert counted(client, "layerbudget_layers_count")["layerbudget_layers_count"] == 2 * len(PROMPTS)
    for answer, wanted in zip(answers, expected, strict=True):
        assert answer.json()["choices"][0]["text"] == wanted.text
        assert answer.headers["x-layer-plan"] == str(wanted.plan)
    assert [choice["text"] for choice in together["choices"]] == [wanted.text for wanted in expected]
    assert together["usage"]["completion_tokens"] > 0


def test_waiting_requests_share_a_batch(engine, monkeypatch) -> None:
    sizes, real = [], serving.local.finished_texts

    def noted(allocator, model, tokenizer, prompts, **options):
        sizes.append(len(prompts))
        return real(allocator, model, tokenizer, prompts, **options)

    monkeypatch.setattr(serving.local, "finished_texts", noted)
    with client_of(engine) as client, ThreadPoolExecutor(8) as threads:
        body = {"model": "tiny", "prompt": "the cat sat", "max_tokens": 6}
        answers = list(threads.map(lambda _: client.post("/v1/completions", json=body), range(8)))
    assert {answer.status_code for answer in answers} == {200}
    assert sum(sizes) == 8
    assert len(sizes) < 8


def test_a_client_that_leaves_has_nothing_generated(engine, monkeypatch) -> None:
    sizes, real, begun, free = [], serving.local.finished_texts, threading.Event(), threading.Event()

    def held(*parts, max_new_tokens, **options):
        sizes.append(max_new_tokens)
        begun.set()
        assert free.wait(60)
        return real(*parts, max_new_tokens=max_new_tokens, **options)

    monkeypatch.setattr(serving.local, "finished_texts", held)
    with client_of(engine) as client, ThreadPoolExecutor(1) as threads:

        def ask(tokens, **options):
            return client.post("/v1/completions", json={"prompt": "a", "max_tokens": tokens}, **options)

        first = threads.submit(ask, 2)
        assert begun.wait(60)
        with pytest.raises(httpx2.ReadTimeout):
            ask(3, timeout=0.5)
        client.get("/health")
        free.set()
        assert {first.result().status_code, ask(4).status_code} == {200}
    assert sizes == [2, 4]


def test_a_stopped_server_ends_after_the_batch_that_it_is_at(engine, monkeypatch) -> None:
    looked, asked, stopped = [], threading.Event(), threading.Event()

    def batches(*_, **__):
        for number in range(100):
            looked.append(number)
            asked.set()
            assert stopped.wait(60)
            yield []

    monkeypatch.setattr(serving.local, "finished_texts", batches)
    with ThreadPoolExecutor(1) as threads:
        with client_of(engine, stop_s=0.1) as client:
            answer = threads.submit(client.post, "/v1/completions", json={"prompt": "a"})
            assert asked.wait(60)
        stopped.set()
        assert answer.exception() or answer.result().status_code >= 500
    for thread in threading.enumerate():
        if thread.name.startswith("layerbudget-generate"):
            thread.join(60)
    assert looked == [0]


def test_a_stream_and_a_stop_are_served(engine) -> None:
    with client_of(engine) as client:
        whole = client.post("/v1/completions", json={"prompt": "a", "max_tokens": 6}).json()["choices"][0]["text"]
        stop = whole[len(whole) // 2]
        body = {"prompt": "a", "max_tokens": 6, "stop": stop, "stream": True}
        events = client.post("/v1/completions", json=body).text.split("\n\n")
    assert json.loads(events[0].removeprefix("data: "))["choices"][0]["text"] == whole[: whole.index(stop)]
    assert events[1] == "data: [DONE]"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"prompt": "a", "tools": [1]}, "tools is not served here"),
        ({"prompt": "a", "n": 2}, "n is not served here"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens should be a number from 1"),
        ({"prompt": "a", "temperature": True}, "temperature should be a number from 0 to 2"),
        ({"prompt": "a", "stop": [""]}, "stop should be a text or a list of texts"),
        ({"prompt": [[]]}, "prompt should be a text, tokens, or a list of these, got [[]]"),
        ({"prompt": ""}, "prompt should be a text, tokens, or a list of these"),
        ({}, "prompt should be a text, tokens, or a list of these, got None"),
        ({"prompt": [[1, 10**6]]}, "a prompt has one token or more, each from 0 to"),
        ({"prompt": "a" * 300}, "a prompt has 300 tokens, more than 250, the most beside 6 new ones"),
        ({"prompt": "a " * 5000}, "a prompt has more than 250 tokens, the most beside 6 new ones"),
        ({"prompt": "a", "max_tokens": 256}, "max_tokens should be less than the model's 256, got 256"),
    ],
)
def test_what_cannot_be_served_is_refused_in_one_sentence(engine, body, message) -> None:
    with client_of(engine) as client:
        answer = client.post("/v1/completions", json=body)
        assert answer.status_code == 400
        assert message in answer.json()["error"]["message"]
        assert client.get("/health").status_code == 200


def test_turns_without_a_template_are_refused(engine) -> None:
    with client_of(engine) as client:
        answer = client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "hi"}]})
    assert answer.status_code == 400
    assert "template" in answer.json()["error"]["message"]


def test_tokens_give_the_answer_of_their_text(engine) -> None:
    tokens = engine[2](PROMPTS[1]).input_ids
    with client_of(engine) as client:
        bodies = ({"prompt": prompt, "max_tokens": 4} for prompt in (PROMPTS[1], tokens, [tokens]))
        answers = [client.post("/v1/completions", json=body).json() for body in bodies]
    assert len({answer["choices"][0]["text"] for answer in answers}) == 1
    assert [answer["usage"]["prompt_tokens"] for answer in answers] == [len(tokens)] * 3


def test_each_prompt_is_tokenized_once_by_one_thread_at_a_time(engine, monkeypatch) -> None:
    seen, working, overlaps = Counter(), threading.Lock(), []
    real = type(engine[2])._encode_plus

    def noted(self, text, *arguments, **options):
        free = working.acquire(blocking=False)
        try:
            seen[text] += 1
            overlaps.append(not free)
            return real(self, text, *arguments, **options)
        finally:
            if free:
                working.release()

    prompts = [f"prompt {number}" for number in range(24)]
    with client_of(engine) as client, ThreadPoolExecutor(8) as threads:
        monkeypatch.setattr(type(engine[2]), "_encode_plus", noted)
        bodies = [{"prompt": prompt, "max_tokens": 2} for prompt in prompts]
        answers = list(threads.map(lambda body: client.post("/v1/completions", json=body), bodies))
    assert {answer.status_code for answer in answers} == {200}
    assert seen == dict.fromkeys(prompts, 1)
    assert not any(overlaps)


def test_health_is_answered_while_a_prompt_is_tokenized(engine, monkeypatch) -> None:
    begun, answered, in_time, real = threading.Event(), threading.Event(), [], type(engine[2])._encode_plus

    def slow(self, *arguments, **options):
        begun.set()
        in_time.append(answered.wait(10))
        return real(self, *arguments, **options)

    with client_of(engine) as client, ThreadPoolExecutor(1) as threads:
        monkeypatch.setattr(type(engine[2]), "_encode_plus", slow)
        asked = threads.submit(client.post, "/v1/completions", json={"prompt": "a", "max_tokens": 2})
        assert begun.wait(20)
        assert client.get("/health").status_code == 200
        answered.set()
        assert asked.result().status_code == 200
    assert in_time == [True]
