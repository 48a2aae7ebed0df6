from __future__ import annotations

import asyncio
import logging
from typing import Any, cast

import msgspec
import pytest
from litestar.types import ASGIApp, Message, Receive, Scope, Send

from pals.api.clients import Client, note_client
from pals.api.observed import Observed, Seen
from pals.cli.logs import fields_of
from pals.errors import EndpointLeaving

CANARY = "canary of somebody"


async def answering(scope: Scope, receive: Receive, send: Send) -> None:
    note_client(scope, Client(key="laptop"))
    cast("dict[str, object]", scope)["path_template"] = "/v1/models/{name:str}"
    await receive()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"four", "more_body": False})


async def failing(_scope: Scope, _receive: Receive, _send: Send) -> None:
    raise ValueError(CANARY)


async def cancelled(_scope: Scope, _receive: Receive, _send: Send) -> None:
    raise asyncio.CancelledError


async def cancelled_midway(_scope: Scope, _receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    raise asyncio.CancelledError


async def failing_midway(_scope: Scope, _receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    raise ValueError(CANARY)


def ask(app: ASGIApp, sent: list[Message] | None = None) -> tuple[list[Message], list[Seen]]:
    sent = [] if sent is None else sent
    seen: list[Seen] = []
    scope = {
        "type": "http",
        "method": "POST",
        "path": f"/v1/models/{CANARY}",
        "query_string": CANARY.encode(),
        "state": dict[str, Any](),
    }

    async def receive() -> Message:
        return {"type": "http.request", "body": b"question", "more_body": False}

    async def send(message: Message) -> None:
        sent.append(message)

    clock = iter([1.0, 1.25])
    observed = Observed(app, observe=seen.append, clock=lambda: next(clock))
    asyncio.run(observed(scope, receive, send))  # pyright: ignore[reportArgumentType]
    return sent, seen


def test_a_request_leaves_one_line_with_ids_sizes_and_times(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO):
        sent, seen = ask(answering)

    (record,) = caplog.records
    fields = fields_of(record)
    headers = dict(cast("dict[str, Any]", sent[0])["headers"])
    assert headers[b"x-request-id"].decode() == fields.pop("id")
    assert fields == {
        "route": "POST /v1/models/{name}",
        "status": 200,
        "ms": 250.0,
        "received_bytes": 8,
        "sent_bytes": 4,
        "key": "laptop",
    }
    assert seen == [Seen(route="POST /v1/models/{name}", status=200, seconds=0.25)]


def test_what_raises_is_answered_and_logged_without_its_text(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO):
        sent, seen = ask(failing)

    assert cast("dict[str, int]", sent[0])["status"] == 500
    assert seen[0].status == 500
    assert CANARY not in caplog.text + repr(sent) + repr([r.__dict__ for r in caplog.records])


def test_an_answer_that_has_begun_is_not_made_to_look_whole(
    caplog: pytest.LogCaptureFixture,
) -> None:
    sent, seen = ask(failing_midway)

    assert [message["type"] for message in sent] == ["http.response.start"]
    assert seen[0].status == 200
    assert CANARY not in caplog.text


def test_a_request_that_the_end_of_a_drain_cancels_is_told_that_the_endpoint_leaves() -> None:
    sent, seen = ask(cancelled)

    start, body = cast("list[dict[str, Any]]", sent)
    assert start["status"] == seen[0].status == 503
    assert dict(start["headers"])[b"content-type"] == b"application/json"
    assert msgspec.json.decode(body["body"])["error"]["code"] == EndpointLeaving.code


def test_an_answer_that_is_cancelled_midway_is_cut() -> None:
    sent: list[Message] = []

    with pytest.raises(asyncio.CancelledError):
        ask(cancelled_midway, sent)

    assert [message["type"] for message in sent] == ["http.response.start"]
