"""Errors as the OpenAI routes give them."""

from __future__ import annotations

import json
from typing import Any

import httpx2
from fastapi.responses import JSONResponse

CLIENT_LEFT = 499
"""As nginx has it: nobody reads the answer."""


class RefusedError(Exception):
    """A request that the router answers itself.

    Attributes:
        status: of the answer.
        headers: of the answer.
    """

    def __init__(self, status: int, sentence: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(sentence)
        self.status, self.headers = status, headers

    @property
    def body(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": None, "code": self.status}}

    @property
    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, self.headers)


class ClientLeftError(Exception):
    """Nobody waits for the answer any more."""


def engine_error(error: Exception, url: str) -> RefusedError:
    """The error for an engine that does not answer or breaks off."""
    reason = str(error) or type(error).__name__
    if isinstance(error, httpx2.TimeoutException) and not isinstance(error, httpx2.ConnectTimeout):
        return RefusedError(504, f"the engine at {url} was silent for too long ({reason})")
    return RefusedError(502, f"the engine at {url} cannot be reached or broke off ({reason})")


def error_events(error: RefusedError) -> bytes:
    """The last events of a stream that breaks off."""
    return f"\n\ndata: {json.dumps(error.body)}\n\ndata: [DONE]\n\n".encode()
