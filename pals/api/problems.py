"""Errors as OpenAI's error object, which every HTTP surface of Pals answers with.

Source: `ErrorResponse` in OpenAI's published OpenAPI schema.
"""

from __future__ import annotations

import logging
import traceback
from typing import TYPE_CHECKING

import msgspec
from litestar.exceptions import HTTPException

from pals.errors import InvalidRequest, MethodNotAllowed, NoSuchRoute, PalsError

if TYPE_CHECKING:
    from litestar.types import Send

RETRY_AFTER_S = 1
JSON_TYPE = "application/json"

_LOG = logging.getLogger(__name__)


def problem_of(method: str, path: str, error: Exception) -> PalsError:
    """Return the error that a failed request is answered with, and log what nobody expects."""
    if isinstance(error, PalsError):
        return error
    refused = error if isinstance(error, HTTPException) else None
    match refused.status_code if refused else None:
        case 404:
            return NoSuchRoute(method=method, path=path[:200])
        case 405:
            allowed = (refused.headers or {}).get("allow", "") if refused else ""
            return MethodNotAllowed(method=method, path=path[:200], allowed=allowed)
        case status if status is not None and status < 500:
            return InvalidRequest(problem="the request is malformed")
        case _:
            # Without the exception's text, which may quote what people wrote.
            frames = "".join(traceback.format_tb(error.__traceback__))
            _LOG.error("internal error: %s\n%s", type(error).__name__, frames)
            return PalsError()


def problem_object(error: PalsError) -> dict[str, dict[str, str | None]]:
    """Return ``{"error": {message, type, param, code}}`` for an error."""
    param = error.fields.get("param")
    return {
        "error": {
            "message": f"{error}; {error.hint}" if error.hint else str(error),
            "type": _problem_type(error.http_status),
            "param": param if isinstance(param, str) else None,
            "code": error.code,
        }
    }


def problem_json(error: PalsError) -> bytes:
    """Return the error object as JSON."""
    return msgspec.json.encode(problem_object(error))


def problem_headers(error: PalsError) -> dict[str, str]:
    """Return the headers that go with an error's status."""
    headers: dict[str, str] = {}
    if error.http_status == 401:
        headers["www-authenticate"] = "Bearer"
    if error.retryable:
        headers["retry-after"] = str(error.fields.get("retry_after_s", RETRY_AFTER_S))
    if allowed := error.fields.get("allowed"):
        headers["allow"] = str(allowed)
    return headers


async def send_problem(send: Send, error: PalsError) -> None:
    """Answer an ASGI request with an error."""
    body = problem_json(error)
    headers = {
        **problem_headers(error),
        "content-type": JSON_TYPE,
        "content-length": str(len(body)),
    }
    await send(
        {
            "type": "http.response.start",
            "status": error.http_status,
            "headers": [(k.encode(), v.encode()) for k, v in headers.items()],
        }
    )
    await send({"type": "http.response.body", "body": body, "more_body": False})


def _problem_type(status: int) -> str:
    if status == 429:
        return "rate_limit_error"
    return "server_error" if status >= 500 else "invalid_request_error"
