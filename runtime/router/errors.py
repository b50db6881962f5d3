"""Errors as the OpenAI routes give them."""

from __future__ import annotations

from typing import Any

import httpx2
from fastapi.responses import JSONResponse

CLIENT_LEFT = 499
"""As nginx has it: nobody reads the answer."""


def error_body(status: int, sentence: str) -> dict[str, Any]:
    kind = "invalid_request_error" if status == 400 else "server_error"
    return {"error": {"message": sentence, "type": kind, "param": None, "code": status}}


def error_response(status: int, sentence: str, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse(error_body(status, sentence), status, headers)


def of_engine(error: httpx2.HTTPError, url: str) -> tuple[int, str]:
    """Status and sentence for an engine that does not answer or breaks off."""
    reason = str(error) or type(error).__name__
    if isinstance(error, httpx2.TimeoutException) and not isinstance(error, httpx2.ConnectTimeout):
        return 504, f"the engine at {url} was silent for too long ({reason})"
    return 502, f"the engine at {url} cannot be reached or broke off ({reason})"
