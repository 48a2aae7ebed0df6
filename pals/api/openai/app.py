"""The routes of the OpenAI-compatible endpoint."""

from __future__ import annotations

from collections.abc import Mapping

from litestar import Litestar, Response, get

from pals.api.admission import Admission
from pals.api.chain import chain_route
from pals.api.gate import JSON_TYPE, MAX_BODY_BYTES, GateSettings
from pals.api.guard import guard
from pals.api.metrics import metrics_route
from pals.api.openai.chat import chat_route
from pals.api.openai.completions import completion_route
from pals.api.openai.embeddings import embedding_route
from pals.api.openai.endpoint import ApiRequest, Endpoint
from pals.api.openai.models import model_routes
from pals.api.openai.stream import ClientGone
from pals.api.problems import problem_headers, problem_json, problem_of
from pals.driver.interface import Driver

CLIENT_CLOSED_REQUEST = 499


def build_openai_app(
    drivers: Mapping[str, Driver], *, gate: GateSettings, admission: Admission | None = None
) -> Litestar:
    """Return the ASGI application that serves models behind ``gate``.

    Args:
        drivers: The models, at least one, by their ids; the first speaks for the endpoint.
        gate: Who may ask.
        admission: How many may ask at one time.
    """
    endpoint = Endpoint(drivers=drivers)
    app = Litestar(
        route_handlers=[
            *model_routes(endpoint),
            chat_route(endpoint),
            completion_route(endpoint),
            embedding_route(endpoint),
            chain_route(drivers),
            metrics_route(endpoint.metrics),
            health,
        ],
        exception_handlers={Exception: _answer_error},
        request_max_body_size=MAX_BODY_BYTES,
        openapi_config=None,
        logging_config=None,
    )
    observe = endpoint.metrics.observe
    return guard(app, gate, admission=admission or Admission(), observe=observe)


@get(["/health", "/healthz"])
async def health() -> dict[str, str]:
    """Say that the process answers; nothing about the swarm."""
    return {"status": "ok"}


def _answer_error(request: ApiRequest, error: Exception) -> Response[bytes]:
    """Answer any failure with OpenAI's error object and its status."""
    if isinstance(error, ClientGone):
        return Response(b"", status_code=CLIENT_CLOSED_REQUEST)
    problem = problem_of(request.method, request.url.path, error)
    return Response(
        problem_json(problem),
        status_code=problem.http_status,
        headers=problem_headers(problem),
        media_type=JSON_TYPE,
    )
