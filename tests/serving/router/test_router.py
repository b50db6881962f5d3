"""The router between a client and an engine, over HTTP: what goes on, what comes back, and what failures do."""

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import httpx2
import pytest
from command import refused
from fake_engine import FakeEngine, served
from routed import PROMPTS, ask, counted, routed, router_parts
from tiny import N_LAYERS, padded_batch, tiny_model, tiny_tokenizer
from tiny_allocator import ByLength, make_allocator, with_healing

from backbone.errors import PlanError, WrongModelError
from backbone.families import decoder_layers, sublayer_bytes
from backbone.plan import LayerPlan, PlanMenu
from serving.router.engines import UpstreamError, Upstreams
from serving.router.selector import RequestSelector, load_probe

DEAD = "http://127.0.0.1:9"


@pytest.fixture(scope="module")
def parts():
    return router_parts()


def test_requests_go_on_with_the_plan_of_the_allocator(parts) -> None:
    engine, plans = FakeEngine(), parts[3]
    assert len(set(plans)) == 3
    with routed(engine) as client:
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
    with routed(FakeEngine()) as client:
        by_text, by_tokens = ask(client, text), ask(client, tokenizer(text).input_ids)
    assert by_text.headers["x-layer-plan"] == by_tokens.headers["x-layer-plan"]


def test_a_request_of_full_depth_goes_on_as_it_came(parts) -> None:
    engine, full = FakeEngine(), parts[0].menu.plans[-1]
    prompt = PROMPTS[parts[3].index(full)]
    with routed(engine) as client:
        ask(client, prompt, temperature=0.5)
    assert engine.bodies == [{"model": "tiny", "prompt": prompt, "temperature": 0.5}]


def test_prompts_of_one_request_share_a_plan_or_run_in_full(parts) -> None:
    short = PROMPTS[parts[3].index(parts[0].menu.plans[0])]
    with routed(FakeEngine()) as client:
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
    with routed(engine) as client:
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
    with routed(FakeEngine(), parts=(broken, model, tokenizer)) as client:
        answer = ask(client, PROMPTS[-1])
    assert answer.status_code == 200
    assert answer.headers["x-layer-plan"] == str(allocator.menu.plans[-1])


def test_a_late_decision_runs_in_full_and_later_ones_are_made(parts) -> None:
    allocator, model, tokenizer, plans = parts
    slow = replace(allocator, controller=Slow())
    slow.controller.__dict__.update(allocator.controller.__dict__)
    with routed(FakeEngine(), parts=(slow, model, tokenizer), decision_ms=100) as client:
        answer = ask(client, PROMPTS[-1])
        assert answer.headers["x-layer-plan"] == str(allocator.menu.plans[-1])
        assert 'because="late"' in client.get("/metrics").text
    with routed(FakeEngine(), parts=(slow, model, tokenizer)) as client:
        assert ask(client, PROMPTS[-1]).headers["x-layer-plan"] == str(plans[-1])


def test_streams_pass_through_and_say_when_the_engine_breaks_off(parts) -> None:
    engine = FakeEngine()
    with routed(engine) as client:
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
    with routed(DEAD) as client:
        answer = ask(client, PROMPTS[0])
        assert answer.status_code == 502
        assert "x-layer-plan" not in answer.headers  # nothing ran
        assert "cannot be reached" in answer.json()["error"]["message"]
        assert client.get("/v1/models").status_code == 502
        health = client.get("/health")
        assert (health.status_code, health.json()) == (503, {"engines": {DEAD: False}})


def test_health_and_models_are_those_of_the_engine(parts) -> None:
    with routed(FakeEngine()) as client:
        health = client.get("/health")
        assert (health.status_code, list(health.json()["engines"].values())) == (200, [True])
        assert client.get("/v1/models").json()["data"] == [{"id": "tiny"}]


def test_an_engine_that_is_silent_ends_with_a_timeout(parts) -> None:
    engine = FakeEngine()
    engine.silence = 3
    with routed(engine, engine_s=0.3) as client:
        answer = ask(client, PROMPTS[0])
        assert answer.status_code == 504
        assert "silent for too long" in answer.json()["error"]["message"]


def test_more_requests_than_allowed_are_refused_at_once(parts) -> None:
    engine = FakeEngine()
    engine.silence = 1
    with routed(engine, in_flight=4) as client, ThreadPoolExecutor(5) as threads:
        answers = list(threads.map(lambda _: ask(client, PROMPTS[0]), range(5)))
        statuses = sorted(answer.status_code for answer in answers)
        assert statuses == [200, 200, 429, 429, 429]
        refused = next(answer for answer in answers if answer.status_code == 429)
        assert refused.headers["retry-after"] == "1"
        assert ask(client, PROMPTS[0]).status_code == 200


def test_when_a_client_leaves_the_engine_is_told(parts) -> None:
    engine = FakeEngine()
    engine.silence = 20
    with routed(engine) as client:
        with pytest.raises(httpx2.ReadTimeout):
            client.post("/v1/completions", json={"prompt": PROMPTS[0]}, timeout=1)
        until = time.monotonic() + 10
        while engine.left == 0 and time.monotonic() < until:
            time.sleep(0.05)
        assert engine.left == 1
        assert counted(client, "layerbudget_in_flight") == {"layerbudget_in_flight": 0}


def test_an_engine_without_plans_is_refused_at_the_start(parts) -> None:
    with served(FakeEngine(knows_plans=False).app) as url, pytest.raises(UpstreamError, match="--worker-cls"):
        Upstreams(url).check()
    with served(FakeEngine().app) as url:
        assert Upstreams(url).check()
    assert not Upstreams(DEAD).check()


def test_each_plan_goes_to_its_pool_or_is_said_to_run_in_full(parts) -> None:
    menu, plans = parts[0].menu, parts[3]
    short, middle, full = (str(plan) for plan in menu.plans)
    full_engine, pool = FakeEngine(knows_plans=False), FakeEngine(knows_plans=False)
    with served(pool.app) as pool_url, routed(full_engine, {short: pool_url}) as client:
        answers = [ask(client, prompt) for prompt in PROMPTS]
        assert counted(client, "layerbudget_plans_total")[_counter("no_pool", full)] == plans.count(menu.plans[1]) > 0
        assert middle not in client.get("/metrics").text
    in_pool = [str(plan) == short for plan in plans]
    assert [body["prompt"] for body in pool.bodies] == [p for p, own in zip(PROMPTS, in_pool, strict=True) if own]
    assert len(full_engine.bodies) == len(PROMPTS) - len(pool.bodies)
    assert all("vllm_xargs" not in body for body in [*pool.bodies, *full_engine.bodies])
    assert [answer.headers["x-layer-plan"] for answer in answers] == [short if own else full for own in in_pool]


def _counter(because: str, plan: str) -> str:
    return f'layerbudget_plans_total{{because="{because}",plan="{plan}"}}'


@pytest.mark.parametrize("knows_plans", [True, False])
def test_all_run_in_full_until_the_engine_is_known_to_run_plans(parts, knows_plans) -> None:
    short, full = (str(parts[0].menu.plans[place]) for place in (0, -1))
    prompt = PROMPTS[[str(plan) for plan in parts[3]].index(short)]
    engine = FakeEngine(knows_plans=knows_plans)
    with routed(engine, is_checked=False) as client:
        answer = ask(client, prompt)
        assert answer.headers["x-layer-plan"] == full
        assert answer.json()["plan"] is None
        assert 'because="unchecked"' in client.get("/metrics").text
        until = time.monotonic() + (10 if knows_plans else 1.5)
        while answer.headers["x-layer-plan"] == full and time.monotonic() < until:
            answer = ask(client, prompt)
            time.sleep(0.05)
        assert answer.headers["x-layer-plan"] == (short if knows_plans else full)
        assert answer.json()["plan"] == (short if knows_plans else None)


@pytest.mark.parametrize(
    ("engine", "pools", "said"),
    [
        ("localhost", [], "an engine's address looks like"),
        ("http://user:word@a", [], "an engine's address looks like"),  # errors would tell it to clients
        ("http://a/?key=1", [], "an engine's address looks like"),
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


def test_a_head_at_full_depth_is_refused_since_no_engine_runs_it(parts) -> None:
    menu = parts[0].menu
    plans = [*menu.plans, LayerPlan.parse(f"0-{menu.n_layers - 1}h", menu.n_layers)]
    healed = PlanMenu.build(plans, sublayer_bytes(parts[1]), menu.probe_depth)
    with pytest.raises(UpstreamError, match="the full depth with an exit head, which no engine runs"):
        Upstreams.of("http://a", [], healed)


def test_the_command_refuses_in_one_sentence(parts, tmp_path) -> None:
    make_allocator(parts[1]).save_pretrained(tmp_path / "allocator")
    given = ["serve", "--allocator", tmp_path / "allocator", "--upstream"]
    assert "an engine's address looks like" in refused(*given, "localhost:8000")
    with served(FakeEngine(knows_plans=False).app) as url:
        assert "does not know layer_plan" in refused(*given, url)
    tiny_model("llama", layer_scale=0.5).save_pretrained(tmp_path / "other")
    parts[2].save_pretrained(tmp_path / "other")
    assert "this allocator was made for" in refused(*given, DEAD, "--model", tmp_path / "other")


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
def test_the_first_layers_decide_as_the_whole_model(family, tmp_path) -> None:
    model = tiny_model(family)
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    allocator = make_allocator(model, controller=ByLength(), name="by_length")
    batch = padded_batch()
    prompts = [row[kept.bool()].tolist() for row, kept in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    probe, tokenizer = load_probe(allocator, str(tmp_path), "cpu")
    assert len(decoder_layers(probe)) == allocator.menu.probe_depth < N_LAYERS
    choices = RequestSelector(allocator, probe, tokenizer).choose([[prompt] for prompt in prompts])
    assert [choice.plan for choice in choices] == allocator.allocate(model, **batch)
    assert {choice.because for choice in choices} == {"chosen"}


def test_another_model_is_refused(tmp_path) -> None:
    tiny_model("llama", layer_scale=0.5).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(WrongModelError):
        load_probe(with_healing(tiny_model("llama")), str(tmp_path), "cpu")
