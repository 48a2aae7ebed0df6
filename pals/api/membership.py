"""The membership service over HTTP: a thin shell over `pals.backend.service`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import msgspec
from litestar import Litestar, Request, Response, get, post, put
from litestar.datastructures import State
from litestar.handlers import HTTPRouteHandler

from pals.api.gate import JSON_TYPE, Gate, GateSettings
from pals.api.problems import problem_headers, problem_json, problem_of
from pals.backend.limiter import AttemptLimiter
from pals.backend.service import BackendService
from pals.errors import BodyTooLarge, InvalidRequest, UnknownSwarm
from pals.swarm.messages import (
    EntriesMessage,
    EntryMessage,
    HintMessage,
    HintsMessage,
    RecordMessage,
    RedeemMessage,
)
from pals.types import SwarmId

MAX_MESSAGE_BYTES = 16 << 10
REDEEMS_PER_MINUTE = 10
SWARMS_PER_MINUTE = 10

ApiRequest = Request[None, None, State]

_Body = TypeVar("_Body", RecordMessage, RedeemMessage, HintMessage)


@dataclass(frozen=True, slots=True, kw_only=True)
class RateLimits:
    """Attempts that one address has within a minute."""

    redeems: int = REDEEMS_PER_MINUTE
    swarms: int = SWARMS_PER_MINUTE


def build_membership_app(
    service: BackendService,
    *,
    gate: GateSettings,
    limits: RateLimits | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Litestar:
    """Return the ASGI application that serves ``service`` behind ``gate``."""
    limits = limits or RateLimits()
    app = Litestar(
        route_handlers=[
            _create_swarm(service, AttemptLimiter(limits.swarms), clock),
            _redeem(service, AttemptLimiter(limits.redeems), clock),
            *_record_routes(service),
            *_hint_routes(service),
            healthz,
        ],
        exception_handlers={Exception: _answer_error},
        openapi_config=None,
        logging_config=None,
    )
    # Litestar's own middleware runs after routing; a refused request must not get that far.
    app.asgi_handler = Gate(app.asgi_handler, gate)
    return app


@get("/healthz")
async def healthz() -> dict[str, str]:
    """Say that the process answers; nothing about any swarm."""
    return {"status": "ok"}


def _create_swarm(
    service: BackendService, limiter: AttemptLimiter, clock: Callable[[], float]
) -> HTTPRouteHandler:
    @post("/v1/swarms")
    async def create_swarm(request: ApiRequest) -> Response[bytes]:
        limiter.check(_address(request), clock())
        message = await _read(request, RecordMessage)
        entry = await asyncio.to_thread(service.create_swarm, message.record)
        return _reply(EntryMessage(entry), status=201)

    return create_swarm


def _redeem(
    service: BackendService, limiter: AttemptLimiter, clock: Callable[[], float]
) -> HTTPRouteHandler:
    @post("/v1/swarms/{swarm:str}/redeem")
    async def redeem(request: ApiRequest) -> Response[bytes]:
        limiter.check(_address(request), clock())
        message = await _read(request, RedeemMessage)
        entry = await asyncio.to_thread(
            service.redeem, _swarm_id(request), message.auth, message.join
        )
        return _reply(EntryMessage(entry))

    return redeem


def _record_routes(service: BackendService) -> tuple[HTTPRouteHandler, HTTPRouteHandler]:
    @post("/v1/swarms/{swarm:str}/records")
    async def append_record(request: ApiRequest) -> Response[bytes]:
        message = await _read(request, RecordMessage)
        entry = await asyncio.to_thread(service.append_record, _swarm_id(request), message.record)
        return _reply(EntryMessage(entry))

    @get("/v1/swarms/{swarm:str}/records")
    async def list_records(request: ApiRequest) -> Response[bytes]:
        swarm_id = _swarm_id(request)
        known = request.headers.get("if-none-match", "")
        if known and known == _quoted(await asyncio.to_thread(service.etag, swarm_id)):
            return Response(b"", status_code=304, headers={"etag": known})
        listed = await asyncio.to_thread(service.entries, swarm_id)
        return _reply(EntriesMessage(listed.entries), etag=_quoted(listed.etag))

    return append_record, list_records


def _hint_routes(service: BackendService) -> tuple[HTTPRouteHandler, HTTPRouteHandler]:
    @put("/v1/swarms/{swarm:str}/hints")
    async def put_hint(request: ApiRequest) -> Response[bytes]:
        message = await _read(request, HintMessage)
        await asyncio.to_thread(service.put_hint, _swarm_id(request), message.hint)
        return Response(b"", status_code=204)

    @get("/v1/swarms/{swarm:str}/hints")
    async def list_hints(request: ApiRequest) -> Response[bytes]:
        return _reply(HintsMessage(await asyncio.to_thread(service.hints, _swarm_id(request))))

    return put_hint, list_hints


async def _read(request: ApiRequest, kind: type[_Body]) -> _Body:
    body = await request.body()
    if len(body) > MAX_MESSAGE_BYTES:
        raise BodyTooLarge(limit_bytes=MAX_MESSAGE_BYTES)
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        # Without msgspec's text, which may quote what proves the right to join.
        raise InvalidRequest(problem=f"the body is not a {kind.__name__}") from None


def _reply(
    message: msgspec.Struct, *, status: int = 200, etag: str | None = None
) -> Response[bytes]:
    return Response(
        msgspec.json.encode(message),
        status_code=status,
        media_type=JSON_TYPE,
        headers=None if etag is None else {"etag": etag},
    )


def _swarm_id(request: ApiRequest) -> SwarmId:
    text = str(request.path_params["swarm"])
    try:
        swarm_id = bytes.fromhex(text)
    except ValueError:
        swarm_id = b""
    if len(swarm_id) != 32:
        raise UnknownSwarm(swarm=text[:64])
    return SwarmId(swarm_id)


def _quoted(etag: str) -> str:
    return f'"{etag}"'


def _address(request: ApiRequest) -> str:
    # The socket's own address: X-Forwarded-For is anybody's claim.
    return request.client.host if request.client else ""


def _answer_error(request: ApiRequest, error: Exception) -> Response[bytes]:
    problem = problem_of(request.method, request.url.path, error)
    return Response(
        problem_json(problem),
        status_code=problem.http_status,
        headers=problem_headers(problem),
        media_type=JSON_TYPE,
    )
