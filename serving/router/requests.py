"""The body of a request: refused unless an engine can be sent just what was judged."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from serving.router.errors import RefusedError
from serving.router.limits import MOST_LEVELS

KEY = "layer_plan"
"""As `layerbudget-vllm` reads it, inside `XARGS`."""

XARGS = "vllm_xargs"

Body = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class RequestBody:
    """A body as it goes on, held as JSON, which takes a fraction of the memory of Python's objects.

    Attributes:
        rest: all but the engine's extra arguments.
        xargs: these, as the client gave them.
    """

    rest: bytes
    xargs: dict[str, Any] | None

    @classmethod
    def of(cls, body: Body) -> RequestBody:
        return cls(encoded({name: value for name, value in body.items() if name != XARGS}), body.get(XARGS))

    def under(self, plan: str | None) -> bytes:
        """The JSON for an engine; with a plan for one that runs plans."""
        xargs = self.xargs if plan is None else {**(self.xargs or {}), KEY: plan}
        if xargs is None:
            return self.rest
        more = encoded({XARGS: xargs})
        return more if self.rest == b"{}" else self.rest[:-1] + b"," + more[1:]


def parsed(content: bytes) -> dict[str, Any]:
    """A request's JSON object. Raises RefusedError for all that is none, or that cannot be passed on as it came."""
    try:
        body = json.loads(content.decode(), parse_constant=_refuse_number)
    except UnicodeDecodeError:
        raise _bad("the body is not UTF-8") from None
    except RecursionError:
        raise _too_deep() from None
    except ValueError as error:
        raise _bad(f"the body is no JSON ({error!s:.80})") from None
    if not isinstance(body, dict):
        raise _bad(f"the body is {content[:40]!r}")
    _check_levels(body)
    try:
        encoded(body)
    except UnicodeEncodeError:
        raise _bad("the body contains an unpaired surrogate, which is no character") from None
    except ValueError:
        _refuse_number("a number beyond 1.8e308")
    xargs = body.get(XARGS)
    if not isinstance(xargs, dict | None):
        raise _bad(f"{XARGS} should be an object, got {xargs!r:.40}")
    if xargs and KEY in xargs:
        raise _bad(f"{XARGS}.{KEY} is chosen by the router; leave it out, or ask the engine itself")
    return body


def encoded(value: Body) -> bytes:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def own_headers(given: Mapping[str, str]) -> dict[str, str]:
    """Those of a request that the engine gets too. Raises RefusedError for what HTTP cannot carry."""
    own = {name: given[name] for name in ("authorization", "x-request-id") if name in given}
    if wrong := [name for name, value in own.items() if not value.isascii()]:
        raise RefusedError(400, f"the header {wrong[0]} should be ASCII, got {own[wrong[0]]!a:.40}")
    return own


def _check_levels(body: Any) -> None:
    level = [body]
    for _ in range(MOST_LEVELS):
        inner = (value.values() if isinstance(value, dict) else value for value in level)
        level = [one for values in inner for one in values if isinstance(one, dict | list)]
        if not level:
            return
    raise _too_deep()


def _too_deep() -> RefusedError:
    return _bad(f"the body is nested more than {MOST_LEVELS} levels deep")


def _refuse_number(text: str) -> NoReturn:
    raise _bad(f"the body holds {text}, for which JSON has no number")


def _bad(wrong: str) -> RefusedError:
    return RefusedError(400, f"{wrong}; a request is a JSON object")
