"""The router between a client and an engine, over HTTP: what goes on, what comes back, and what failures do."""

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace

import httpx2
import pytest
from command import refused
from fake_engine import FakeEngine, served
from tiny import padded_batch, tiny_model, tiny_tokenizer
from tiny_allocator import ByLength, make_allocator

from backbone.plan import PlanError
from runtime.router.app import make_app
from runtime.router.choosing import Chooser
from runtime.router.upstreams import UpstreamError, Upstreams

DEAD = "http://127.0.0.1:9"
_batch = padded_batch()
PROMPTS = [row[kept.bool()].tolist() for row, kept in zip(_batch["input_ids"], _batch["attention_mask"], strict=True)]


@pytest.fixture(scope="module")
def parts():
    model = tiny_model("llama")
    allocator = make_allocator(model, controller=ByLength(), name="by_length")
    return allocator, model, tiny_tokenizer(), allocator.allocate(model, **_batch)


@contextmanager
def routed(parts, engine, pools=None, limit_ms=20_000.0, **options):
    """A client of a router before an engine: a `FakeEngine`, or the URL of none."""
    allocator, model, tokenizer, _ = parts
    chooser = Chooser(allocator, model, tokenizer, limit_ms)
    if isinstance(engine, str):
        app = make_app(chooser, Upstreams(engine, pools or {}), **options)
        with served(app) as url, httpx2.Client(base_url=url, timeout=30) as client:
            yield client
        return
    with served(engine.app) as own, routed(parts, own, pools, limit_ms, **options) as client:
        yield client


def ask(client, prompt, **more):
    return client.post("/v1/completions", json={"model": "tiny", "prompt": prompt, **more})


def counted(client, name):
    lines = [line for line in client.get("/metrics").text.splitlines() if line.startswith(name)]
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}


def test_each_request_goes_on_with_the_plan_that_the_allocator_chooses(parts) -> None:
    engine, plans = FakeEngine(), parts[3]
    assert len(set(plans)) == 3
    with routed(parts, engine) as client:
        with ThreadPoolExecutor(4) as threads:
            answers = list(threads.map(lambda prompt: ask(client, prompt, vllm_xargs={"own": 1}), PROMPTS))
        for answer, plan in zip(answers, plans, strict=True):
            assert answer.status_code == 200
            assert answer.headers["x-layer-plan"] == str(plan)
            assert answer.json()["plan"] == (None if plan.is_full else str(plan))
        assert all(body["vllm_xargs"]["own"] == 1 for body in engine.bodies)
        found = counted(client, "layerbudget_plans_total")
        for plan in set(plans):
            assert found[f'layerbudget_plans_total{{because="chosen",plan="{plan}"}}'] == plans.count(plan)
        assert counted(client, "layerbudget_layers_sum") == {"layerbudget_layers_sum": sum(p.layers for p in plans)}
        assert counted(client, "layerbudget_answers_total")['layerbudget_answers_total{status="200"}'] == len(PROMPTS)


def test_a_text_and_its_tokens_get_the_same_plan(parts) -> None:
    tokenizer, text = parts[2], "abcd"
    with routed(parts, FakeEngine()) as client:
        by_text, by_tokens = ask(client, text), ask(client, tokenizer(text).input_ids)
    assert by_text.headers["x-layer-plan"] == by_tokens.headers["x-layer-plan"]


def test_a_request_of_full_depth_goes_on_as_it_came(parts) -> None:
    engine, full = FakeEngine(), parts[0].menu.plans[-1]
    prompt = PROMPTS[parts[3].index(full)]
    with routed(parts, engine) as client:
        ask(client, prompt, temperature=0.5)
    assert engine.bodies == [{"model": "tiny", "prompt": prompt, "temperature": 0.5}]


def test_several_prompts_in_one_request_run_one_plan_or_the_full_one(parts) -> None:
    short = PROMPTS[parts[3].index(parts[0].menu.plans[0])]
    with routed(parts, FakeEngine()) as client:
        assert ask(client, [short, short]).headers["x-layer-plan"] == str(parts[0].menu.plans[0])
        assert ask(client, PROMPTS).headers["x-layer-plan"] == str(parts[0].menu.plans[-1])
        assert 'because="several"' in client.get("/metrics").text


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("completions", {"prompt": [[100_000]]}),
        ("completions", {"prompt": 7}),
        ("completions", {}),
        ("chat/completions", {"messages": [{"role": "user", "content": "a"}]}),  # this allocator has no template
        ("chat/completions", {"messages": [{"role": "user", "content": "a"}], "tools": [{}]}),
        ("chat/completions", {"messages": "a"}),
    ],
)
def test_a_prompt_that_cannot_be_judged_runs_in_full(parts, path, body) -> None:
    engine = FakeEngine()
    with routed(parts, engine) as client:
        answer = client.post(f"/v1/{path}", json=body)
        assert 'because="unreadable"' in client.get("/metrics").text
    assert engine.bodies == [body]
    assert answer.headers["x-layer-plan"] == str(parts[0].menu.plans[-1])


class Failing(ByLength):
    def _predict(self, features):
        raise RuntimeError("no prediction")


class Slow(ByLength):
    def _predict(self, features):
        time.sleep(0.5)
        return super()._predict(features)


def test_a_failing_decision_runs_in_full(parts) -> None:
    allocator, model, tokenizer, _ = parts
    broken = replace(allocator, controller=Failing())
    with routed((broken, model, tokenizer, None), FakeEngine()) as client:
        answer = ask(client, PROMPTS[-1])
    assert answer.status_code == 200
    assert answer.headers["x-layer-plan"] == str(allocator.menu.plans[-1])


def test_a_late_decision_runs_in_full_and_later_ones_are_made(parts) -> None:
    allocator, model, tokenizer, plans = parts
    slow = replace(allocator, controller=Slow())
    slow.controller.__dict__.update(allocator.controller.__dict__)
    with routed((slow, model, tokenizer, None), FakeEngine(), limit_ms=100) as client:
        answer = ask(client, PROMPTS[-1])
        assert answer.headers["x-layer-plan"] == str(allocator.menu.plans[-1])
        assert 'because="late"' in client.get("/metrics").text
    with routed((slow, model, tokenizer, None), FakeEngine(), limit_ms=20_000) as client:
        assert ask(client, PROMPTS[-1]).headers["x-layer-plan"] == str(plans[-1])


def test_streams_pass_through_and_say_when_the_engine_breaks_off(parts) -> None:
    engine = FakeEngine()
    with routed(parts, engine) as client:
        whole = ask(client, PROMPTS[0], stream=True)
        assert whole.headers["content-type"].startswith("text/event-stream")
        assert [line for line in whole.text.split("\n\n") if line][-1] == "data: [DONE]"
        assert whole.text.count('"text"') == 2
        engine.breaks = True
        broken = ask(client, PROMPTS[0], stream=True)
        assert '"text": "one"' in broken.text
        assert "broke off" in broken.text
        assert broken.text.endswith("data: [DONE]\n\n")
        assert counted(client, "layerbudget_broken_streams_total") == {"layerbudget_broken_streams_total": 1}
        assert counted(client, "layerbudget_in_flight") == {"layerbudget_in_flight": 0}


def test_an_engine_that_is_not_there_is_said_to_be(parts) -> None:
    with routed(parts, DEAD) as client:
        answer = ask(client, PROMPTS[0])
        assert answer.status_code == 502
        assert "cannot be reached" in answer.json()["error"]["message"]
        assert client.get("/v1/models").status_code == 502
        health = client.get("/health")
        assert (health.status_code, health.json()) == (503, {"engines": {DEAD: False}})


def test_health_and_models_are_those_of_the_engine(parts) -> None:
    with routed(parts, FakeEngine()) as client:
        health = client.get("/health")
        assert (health.status_code, list(health.json()["engines"].values())) == (200, [True])
        assert client.get("/v1/models").json()["data"] == [{"id": "tiny"}]


def test_an_engine_that_is_silent_ends_with_a_timeout(parts) -> None:
    engine = FakeEngine()
    engine.silence = 3
    with routed(parts, engine, timeout_s=0.3) as client:
        answer = ask(client, PROMPTS[0])
        assert answer.status_code == 504
        assert "silent for too long" in answer.json()["error"]["message"]


def test_more_requests_than_allowed_are_refused_at_once(parts) -> None:
    engine = FakeEngine()
    engine.silence = 1
    with routed(parts, engine, max_in_flight=2) as client, ThreadPoolExecutor(5) as threads:
        answers = list(threads.map(lambda _: ask(client, PROMPTS[0]), range(5)))
        statuses = sorted(answer.status_code for answer in answers)
        assert statuses == [200, 200, 429, 429, 429]
        refused = next(answer for answer in answers if answer.status_code == 429)
        assert refused.headers["retry-after"] == "1"
        assert ask(client, PROMPTS[0]).status_code == 200


def test_when_a_client_leaves_the_engine_is_told(parts) -> None:
    engine = FakeEngine()
    engine.silence = 20
    with routed(parts, engine) as client:
        with pytest.raises(httpx2.ReadTimeout):
            client.post("/v1/completions", json={"prompt": PROMPTS[0]}, timeout=1)
        until = time.monotonic() + 10
        while engine.left == 0 and time.monotonic() < until:
            time.sleep(0.05)
        assert engine.left == 1
        assert counted(client, "layerbudget_in_flight") == {"layerbudget_in_flight": 0}


@pytest.mark.parametrize("content", [b"no json", b"[1]", b""])
def test_a_body_that_is_no_object_is_refused(parts, content) -> None:
    with routed(parts, FakeEngine()) as client:
        answer = client.post("/v1/completions", content=content)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == "the body of a request is a JSON object"


def test_an_engine_without_plans_is_refused_at_the_start(parts) -> None:
    with served(FakeEngine(knows_plans=False).app) as url, pytest.raises(UpstreamError, match="--worker-cls"):
        Upstreams(url).check()
    with served(FakeEngine().app) as url:
        assert Upstreams(url).check()
    assert not Upstreams(DEAD).check()


def test_each_plan_goes_to_its_pool(parts) -> None:
    menu, plans = parts[0].menu, parts[3]
    short, middle = (str(plan) for plan in menu.plans[:2])
    full_engine, pool = FakeEngine(knows_plans=False), FakeEngine(knows_plans=False)
    with served(pool.app) as pool_url, routed(parts, full_engine, {short: pool_url}) as client:
        for prompt in PROMPTS:
            ask(client, prompt)
    assert [body["prompt"] for body in pool.bodies] == [
        p for p, plan in zip(PROMPTS, plans, strict=True) if str(plan) == short
    ]
    assert len(full_engine.bodies) == len(PROMPTS) - len(pool.bodies)  # the middle plan has no pool and runs in full
    assert all("vllm_xargs" not in body for body in [*pool.bodies, *full_engine.bodies])
    assert middle in {str(plan) for plan in plans}


@pytest.mark.parametrize(
    ("engine", "pools", "said"),
    [
        ("localhost", [], "an engine's address looks like"),
        ("http://a", ["0-5=http://b"], "a shortened plan of the menu"),
        ("http://a", ["0-2,5=b"], "an engine's address looks like"),
    ],
)
def test_addresses_and_pools_that_cannot_be_are_refused(parts, engine, pools, said) -> None:
    with pytest.raises(UpstreamError, match=said):
        Upstreams.of(engine, pools, parts[0].menu)


def test_a_pool_for_no_plan_is_refused(parts) -> None:
    with pytest.raises(PlanError):
        Upstreams.of("http://a", ["x=http://b"], parts[0].menu)


def test_the_command_refuses_in_one_sentence(parts, tmp_path) -> None:
    make_allocator(parts[1]).save_pretrained(tmp_path / "allocator")
    given = ["serve", "--allocator", tmp_path / "allocator", "--upstream"]
    assert "an engine's address looks like" in refused(*given, "localhost:8000")
    with served(FakeEngine(knows_plans=False).app) as url:
        assert "does not know layer_plan" in refused(*given, url)
    tiny_model("llama", layer_scale=0.5).save_pretrained(tmp_path / "other")
    parts[2].save_pretrained(tmp_path / "other")
    assert "this allocator was made for" in refused(*given, DEAD, "--model", tmp_path / "other")
