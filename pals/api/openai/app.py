"""The routes of the OpenAI-compatible endpoint."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence

import msgspec
from litestar import Litestar, Request, Response, get, post
from litestar.background_tasks import BackgroundTask
from litestar.datastructures import State
from litestar.handlers import HTTPRouteHandler
from litestar.response import Stream

from pals.api.admission import Admission
from pals.api.chain import chain_route
from pals.api.gate import JSON_TYPE, MAX_BODY_BYTES, GateSettings
from pals.api.guard import guard
from pals.api.openai.parse import conversation, generate_params, parse_request
from pals.api.openai.schema import (
    AnswerMessage,
    ChatCompletion,
    ChatRequest,
    Choice,
    Chunk,
    Model,
    ModelList,
)
from pals.api.openai.stream import (
    HEARTBEAT_S,
    ChunkWriter,
    ClientGone,
    closing,
    content_of,
    primed,
    unless_disconnected,
    usage_of,
    with_heartbeats,
)
from pals.api.problems import problem_headers, problem_json, problem_of
from pals.driver.interface import Completion, Delta, Driver
from pals.errors import UnknownModel

CLIENT_CLOSED_REQUEST = 499

ApiRequest = Request[None, None, State]


<<<<<<< HEAD
Drivers = Mapping[str, Driver]
"""The models that are served, by their ids; the first is the one meant where none is named."""


def build_openai_app(drivers: Drivers, *, gate: GateSettings) -> Litestar:
    """Return the ASGI application that serves ``drivers`` behind ``gate``."""
=======
def build_openai_app(
    driver: Driver, *, gate: GateSettings, admission: Admission | None = None
) -> Litestar:
    """Return the ASGI application that serves ``driver`` behind ``gate``."""
>>>>>>> gate
    app = Litestar(
        route_handlers=[
            *_model_routes(drivers),
            _chat_route(drivers),
            chain_route(drivers),
            health,
        ],
        exception_handlers={Exception: _answer_error},
        request_max_body_size=MAX_BODY_BYTES,
        openapi_config=None,
        logging_config=None,
    )
    return guard(app, gate, admission=admission or Admission())


@get(["/health", "/healthz"])
async def health() -> dict[str, str]:
    """Say that the process answers; nothing about the swarm."""
    return {"status": "ok"}


def _model_routes(drivers: Drivers) -> Sequence[HTTPRouteHandler]:
    def describe(driver: Driver) -> Model:
        return Model(id=driver.model_id, created=driver.created)

    @get("/v1/models")
    async def list_models() -> ModelList:
        return ModelList(data=[describe(driver) for driver in drivers.values()])

    @get("/v1/models/{model_id:path}")
    async def get_model(request: ApiRequest) -> Model:
        name = str(request.path_params["model_id"]).removeprefix("/")
        return describe(find_driver(drivers, name))

    return list_models, get_model


def _chat_route(drivers: Drivers) -> HTTPRouteHandler:
    @post("/v1/chat/completions", status_code=200)
    async def create_chat_completion(request: ApiRequest) -> Response[bytes] | Stream:
        chat = parse_request(await request.body())
        driver = find_driver(drivers, chat.model)
        if chat.stream:
            return await unless_disconnected(request.receive, _start_stream(driver, chat))
        answer = await unless_disconnected(request.receive, _whole_answer(driver, chat))
        return Response(msgspec.json.encode(answer), media_type=JSON_TYPE)

    return create_chat_completion


def find_driver(drivers: Drivers, name: str) -> Driver:
    """Return the driver of the model that a request names.

    Raises:
        UnknownModel: It is not served here.
    """
    driver = drivers.get(name)
    if driver is None:
        raise UnknownModel(model=name[:200], served="`, `".join(drivers), param="model")
    return driver


async def _whole_answer(driver: Driver, chat: ChatRequest) -> ChatCompletion:
    completion = await driver.chat(conversation(chat), generate_params(chat))
    async with closing(completion):
        deltas = [delta async for delta in completion]
    text = "".join(map(content_of, deltas))
    reason = next((d.finish_reason for d in deltas if d.finish_reason is not None), "stop")
    return ChatCompletion(
        id=_completion_id(),
        created=int(time.time()),
        model=driver.model_id,
        choices=[Choice(message=AnswerMessage(content=text), finish_reason=reason)],
        usage=usage_of(completion),
    )


async def _start_stream(driver: Driver, chat: ChatRequest) -> Stream:
    """Return the response once the first text is there, or its failure is known."""
    completion = await driver.chat(conversation(chat), generate_params(chat))
    try:
        deltas = await primed(aiter(completion), wait_s=HEARTBEAT_S)
    except BaseException:
        async with closing(completion):
            raise
    options = chat.stream_options
    include_usage = options is not None and bool(options.include_usage)
    return _stream_response(driver, completion, deltas, include_usage=include_usage)


def _stream_response(
    driver: Driver, completion: Completion, deltas: AsyncIterator[Delta], *, include_usage: bool
) -> Stream:
    head = Chunk(id=_completion_id(), created=int(time.time()), model=driver.model_id, choices=[])
    writer = ChunkWriter(completion, head, include_usage=include_usage)
    return Stream(
        with_heartbeats(writer.events(deltas)),
        media_type="text/event-stream",
        headers={"cache-control": "no-cache", "x-accel-buffering": "no"},
        # A generator that was never begun has no `finally`: the client left too early.
        background=BackgroundTask(completion.aclose),
    )


def _completion_id() -> str:
    return f"chatcmpl-{uuid.uuid4().hex}"


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
