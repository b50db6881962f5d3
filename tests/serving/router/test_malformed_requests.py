"""More than 500 requests that are none: 400 in OpenAI's form, no traceback, and none reaches the engine.

Odd requests that are valid JSON reach the engine as they are.
"""

import json

import pytest
from fake_engine import FakeEngine
from routed import ask, connected, logged_tracebacks, post, routed, said

ROUTES = ("/v1/completions", "/v1/chat/completions")
VALID = json.dumps({"model": "tiny", "prompt": "ab", "messages": [{"role": "user", "content": "é"}]}).encode()
FIELDS = ("model", "prompt", "messages", "max_tokens", "stream", "stop", "temperature", "vllm_xargs", "unknown")
NOT_JSON = {
    "nan": b"NaN",
    "infinity": b"Infinity",
    "minus infinity": b"[-Infinity]",
    "beyond": b'{"a": 1e999}',
    "minus beyond": b"-1e999",
    "surrogate": rb'"\ud800"',
    "surrogate inside": rb'["a\udfffb"]',
    "surrogate as name": rb'{"\udc00": 1}',
    "200 levels": b"[" * 200 + b"]" * 200,
    "100000 levels": b"[" * 100_000 + b"]" * 100_000,
    "100000 objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "5000 digits": b"9" * 5000,
    "bare word": b"none",
}
XARGS = (b"1", b"0", b'"a"', b'""', b"[]", b"[1]", b"true", b"false", b'{"layer_plan": "0-2"}', b'{"layer_plan": null}')
BODIES = {
    **{f"cut at {place}": VALID[:place] for place in range(len(VALID))},
    **{f"no UTF-8 at {place}": VALID[:place] + b"\xff" + VALID[place:] for place in range(len(VALID))},
    **{repr(text): text.encode() for text in ("[]", "[1]", "1", "null", "true", '"a"', "{}{}", "{}x", "{'a': 1}")},
    **{name: VALID.decode().encode(name) for name in ("utf-16", "utf-16-le", "utf-32", "utf-8-sig")},
    "bytes": bytes(range(256)),
    "zeros": bytes(1000),
    "gzip": b"\x1f\x8b\x08\x00" + bytes(50),
}
NO_HEADERS = (b"\xe9", "é".encode(), b"a\x80b", b"Bearer \xff", "日本".encode("utf-16-be").replace(b"\0", b""))
CHUNKED = b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n"
NO_HTTP = {
    "no method": b"\r\n\r\nPOST\r\n\r\n",
    "tls": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(40),
    "no version": b"POST /v1/completions\r\n\r\n",
    "path with a space": b"POST /v1/comp letions HTTP/1.1\r\nhost: a\r\n\r\n",
    "path that is not ASCII": "POST /v1/é HTTP/1.1\r\nhost: a\r\n\r\n".encode(),
    "no host": b"POST /v1/completions HTTP/1.1\r\ncontent-length: 2\r\n\r\n{}",
    "two hosts": post(VALID, head=b"host: b\r\n"),
    "two lengths": post(VALID, head=b"content-length: 3\r\n"),
    "minus length": b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: -1\r\n\r\n",
    "length of 30 digits": b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: " + b"9" * 30 + b"\r\n\r\n",
    "other coding": b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ntransfer-encoding: gzip, chunked\r\n\r\n",
    "zero in a header": post(VALID, head=b"x: a\0b\r\n"),
    "header without a colon": post(VALID, head=b"nothing\r\n"),
    "name with a space": post(VALID, head=b"a b: c\r\n"),
    "head of 300 kB": post(VALID, head=b"x: " + b"a" * 300_000 + b"\r\n"),
    "30000 headers": post(VALID, head=b"x: a\r\n" * 30_000),
    "chunk without a length": CHUNKED + b"xyz\r\n",
    "chunk of minus length": CHUNKED + b"-5\r\nab\r\n",
}
CASES = {
    **{
        f"{route} {field} {name}": post(b'{"%s": %s}' % (field.encode(), value), route)
        for route in ROUTES
        for field in FIELDS
        for name, value in NOT_JSON.items()
    },
    **{f"{route} {name}": post(body, route) for route in ROUTES for name, body in BODIES.items()},
    **{f"{route} xargs {value!r}": post(b'{"vllm_xargs": %s}' % value, route) for route in ROUTES for value in XARGS},
    **{
        f"{route} {name.decode()} {value!r}": post(VALID, route, name + b": " + value + b"\r\n")
        for route in ROUTES
        for name in (b"authorization", b"x-request-id")
        for value in NO_HEADERS
    },
    **NO_HTTP,
}
ODD = [
    *({"prompt": value} for value in (None, True, 7, 0.5, {}, [], [[]], [""], "", [1, "a"], [True], [-1], [10**30])),
    *({"messages": value} for value in (None, 7, "a", {}, [], [[]], [None], [{}], [{"role": 7}], [{"content": [[]]}])),
    *({"prompt": "ab", "vllm_xargs": value} for value in (None, {}, {"a": None}, {"layer_plans": 1})),
    *({"prompt": text} for text in ("\0", "😀", "\u202e", "é" * 100, "\r\n\r\nPOST / HTTP/1.1")),
    {"a": eval("[" * 90 + "]" * 90), "b": 10**300, "c": -1e308, "": 1, "prompt": "ab"},
]


def test_requests_that_are_none_get_400() -> None:
    assert len(CASES) > 500
    engine, wrong = FakeEngine(), {}
    with routed(engine) as client, logged_tracebacks() as tracebacks:
        for name, request in CASES.items():
            answer = said(connected(client, request))
            head, _, body = answer.partition(b"\r\n\r\n")
            if not head.startswith(b"HTTP/1.1 400 ") or not _is_error(body):
                wrong[name] = answer[:200]
        assert not wrong, f"{len(wrong)} of {len(CASES)}: {wrong}"
        assert not tracebacks, f"{len(tracebacks)}: {tracebacks[0]}"
        assert not engine.bodies
        assert ask(client, "ab").status_code == 200


def _is_error(body: bytes) -> bool:
    error = json.loads(body)["error"]
    return {**error, "message": ""} == {
        "message": "",
        "type": "invalid_request_error",
        "param": None,
        "code": 400,
    } and bool(error["message"])


def test_odd_requests_reach_the_engine_as_they_are() -> None:
    engine = FakeEngine()
    with routed(engine) as client, logged_tracebacks() as tracebacks:
        for body in ODD:
            for route in ROUTES:
                assert client.post(route, json=body).status_code == 200, body
                got = engine.bodies[-1]
                own = {
                    name: value for name, value in (got.pop("vllm_xargs", None) or {}).items() if name != "layer_plan"
                }
                assert own == (body.get("vllm_xargs") or {})
                assert got == {name: value for name, value in body.items() if name != "vllm_xargs"}
        assert not tracebacks, tracebacks[0]


@pytest.mark.parametrize("host", [b"[", b"x/v1/models?", b"\xe9", b"a:99999", b"", b"http://b"])
def test_no_host_header_changes_where_a_request_goes(host) -> None:
    engine = FakeEngine()
    request = post(b'{"prompt": "ab"}').replace(b"host: a\r\n", b"host: " + host + b"\r\n")
    with routed(engine) as client, logged_tracebacks() as tracebacks:
        answer = said(connected(client, request))
    assert answer.startswith((b"HTTP/1.1 200", b"HTTP/1.1 400")), answer[:200]
    assert len(engine.bodies) == answer.startswith(b"HTTP/1.1 200")
    assert not tracebacks


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/", 404), ("POST", "/v1/completions/", 404), ("PUT", "/v1/completions", 405), ("POST", "/v1/x", 404)],
)
def test_other_paths_and_methods_get_an_error_in_form(method, path, status) -> None:
    with routed(FakeEngine()) as client:
        answer = client.request(method, path)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, status)
