"""The membership service over HTTP: a thin shell over `pals.backend.service`."""

from __future__ import annotations

import asyncio
import base64
import ipaddress
import logging
from dataclasses import dataclass
from typing import TypeVar

import msgspec
from litestar import Litestar, Request, Response, get, post, put
from litestar.datastructures import State
from litestar.handlers import HTTPRouteHandler

from pals.api.gate import JSON_TYPE, GateSettings
from pals.api.guard import guard
from pals.api.observed import Seen
from pals.api.problems import problem_headers, problem_json, problem_of
from pals.backend import metrics as backend_metrics
from pals.backend.limiter import BackendLimiter
from pals.backend.metrics import BackendMetrics
from pals.backend.service import BackendService, SignedRequest
from pals.errors import BodyTooLarge, InvalidRequest, StorageFailed, UnknownSwarm
from pals.swarm.freshness import HEADER as FRESHNESS_HEADER
from pals.swarm.messages import (
    BackendMessage,
    EntriesMessage,
    EntryMessage,
    HintMessage,
    HintsMessage,
    RecordMessage,
    RedeemMessage,
)
from pals.swarm.requests import HEADER as AUTHORIZATION_HEADER
from pals.types import SwarmId

MAX_MESSAGE_BYTES = 16 << 10

ApiRequest = Request[None, None, State]

_Body = TypeVar("_Body", RecordMessage, RedeemMessage, HintMessage)

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What the routes share besides the service.

    Attributes:
        limiter: How often one address may ask; the same on every transport.
        metrics: Where requests are counted.
        proxies: Addresses whose `X-Forwarded-For` is believed; nobody's by default.
    """

    limiter: BackendLimiter
    metrics: BackendMetrics
    proxies: frozenset[str] = frozenset()


def build_membership_app(
    service: BackendService,
    *,
    gate: GateSettings,
    limiter: BackendLimiter | None = None,
    metrics: BackendMetrics | None = None,
    proxies: frozenset[str] = frozenset(),
) -> Litestar:
    """Return the ASGI application that serves ``service`` behind ``gate``."""
    around = Surroundings(
        limiter=limiter or BackendLimiter(),
        metrics=metrics or BackendMetrics(),
        proxies=proxies,
    )
    app = Litestar(
        route_handlers=[
            *_backend_routes(service, around.metrics),
            _create_swarm(service, around),
            _redeem(service, around),
            *_record_routes(service, around),
            *_hint_routes(service, around),
        ],
        exception_handlers={Exception: _answer_error},
        openapi_config=None,
        logging_config=None,
    )

    def observe(seen: Seen) -> None:
        around.metrics.observe(
            transport="http", route=seen.route, status=seen.status, seconds=seen.seconds
        )

    return guard(app, gate, observe=observe)


def _backend_routes(
    service: BackendService, metrics: BackendMetrics
) -> tuple[HTTPRouteHandler, ...]:
    @get("/healthz")
    async def healthz() -> dict[str, str]:
        # Nothing about any swarm, and no reason: a stranger may ask.
        await asyncio.to_thread(service.check)
        return {"status": "ok"}

    @get("/metrics")
    async def show_metrics() -> Response[bytes]:
        return Response(metrics.render(), media_type=backend_metrics.CONTENT_TYPE)

    @get("/v1/backend")
    async def show_backend() -> Response[bytes]:
        return _reply(BackendMessage(service.public_key))

    return healthz, show_metrics, show_backend


def _create_swarm(service: BackendService, around: Surroundings) -> HTTPRouteHandler:
    @post("/v1/swarms")
    async def create_swarm(request: ApiRequest) -> Response[bytes]:
        around.limiter.create_swarm(source_of(request, around.proxies))
        message = await _read(request, RecordMessage)
        entry = await asyncio.to_thread(service.create_swarm, message.record)
        return _reply(EntryMessage(entry), status=201)

    return create_swarm


def _redeem(service: BackendService, around: Surroundings) -> HTTPRouteHandler:
    @post("/v1/swarms/{swarm:str}/redeem")
    async def redeem(request: ApiRequest) -> Response[bytes]:
        swarm_id = _swarm_id(request)
        around.limiter.redeem(source_of(request, around.proxies), swarm_id)
        message = await _read(request, RedeemMessage)
        entry = await asyncio.to_thread(service.redeem, swarm_id, message.auth, message.join)
        return _reply(EntryMessage(entry))

    return redeem


def _record_routes(
    service: BackendService, around: Surroundings
) -> tuple[HTTPRouteHandler, HTTPRouteHandler]:
    @post("/v1/swarms/{swarm:str}/records")
    async def append_record(request: ApiRequest) -> Response[bytes]:
        around.limiter.write(source_of(request, around.proxies))
        message, swarm_id = await _read(request, RecordMessage), _swarm_id(request)
        signed = SignedRequest(
            method="POST",
            path=f"/v1/swarms/{swarm_id.hex()}/records",
            body=await request.body(),
            authorization=request.headers.get(AUTHORIZATION_HEADER, ""),
        )
        entry = await asyncio.to_thread(service.append_record, swarm_id, message.record, signed)
        return _reply(EntryMessage(entry))

    @get("/v1/swarms/{swarm:str}/records")
    async def list_records(request: ApiRequest) -> Response[bytes]:
        around.limiter.read(source_of(request, around.proxies))
        swarm_id = _swarm_id(request)
        known = request.headers.get("if-none-match", "").strip('"')
        listed = await asyncio.to_thread(service.entries, swarm_id, known)
        headers = {"etag": f'"{listed.etag}"'}
        if listed.freshness:
            headers[FRESHNESS_HEADER] = base64.urlsafe_b64encode(listed.freshness).decode()
        if listed.entries is None:
            return Response(b"", status_code=304, headers=headers)
        return _reply(EntriesMessage(listed.entries), headers=headers)

    return append_record, list_records


def _hint_routes(
    service: BackendService, around: Surroundings
) -> tuple[HTTPRouteHandler, HTTPRouteHandler]:
    @put("/v1/swarms/{swarm:str}/hints")
    async def put_hint(request: ApiRequest) -> Response[bytes]:
        around.limiter.write(source_of(request, around.proxies))
        message = await _read(request, HintMessage)
        await asyncio.to_thread(service.put_hint, _swarm_id(request), message.hint)
        return Response(b"", status_code=204)

    @get("/v1/swarms/{swarm:str}/hints")
    async def list_hints(request: ApiRequest) -> Response[bytes]:
        around.limiter.read(source_of(request, around.proxies))
        return _reply(HintsMessage(await asyncio.to_thread(service.hints, _swarm_id(request))))

    return put_hint, list_hints


def source_of(request: ApiRequest, proxies: frozenset[str]) -> str:
    """Return the address that a request counts against.

    It is the socket's own, for `X-Forwarded-For` is anybody's claim, unless the socket is a
    configured proxy's: then it is the last address that no such proxy has added.
    """
    source = request.client.host if request.client else ""
    claimed = request.headers.getall("x-forwarded-for", [])
    hops = [hop.strip() for value in claimed for hop in value.split(",")]
    while source in proxies and hops:
        source = hops.pop()
    return source if _is_address(source) else ""


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
    message: msgspec.Struct, *, status: int = 200, headers: dict[str, str] | None = None
) -> Response[bytes]:
    return Response(
        msgspec.json.encode(message),
        status_code=status,
        media_type=JSON_TYPE,
        headers=headers,
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


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _answer_error(request: ApiRequest, error: Exception) -> Response[bytes]:
    problem = problem_of(request.method, request.url.path, error)
    if isinstance(problem, StorageFailed):
        _log.error("%s", problem)
        # Strangers need not know where the database is, nor what is wrong with it.
        problem = StorageFailed(problem="the backend's log says why")
    return Response(
        problem_json(problem),
        status_code=problem.http_status,
        headers=problem_headers(problem),
        media_type=JSON_TYPE,
    )
