"""From a request that was read to its response, whole or streamed."""

from __future__ import annotations

from collections.abc import Coroutine, Sequence
from typing import Protocol

import msgspec
from litestar import Response
from litestar.background_tasks import BackgroundTask
from litestar.response import Stream
from litestar.types import Receive

from pals.api.gate import JSON_TYPE
from pals.api.metrics import EndpointMetrics
from pals.api.openai.running import Running, answer_headers, usage_of
from pals.api.openai.schema.shared import Usage
from pals.api.openai.stream import (
    HEARTBEAT_S,
    ChunkForm,
    events,
    primed,
    unless_disconnected,
    with_heartbeats,
)
from pals.driver.interface import Completion, Delta

Start = Coroutine[object, None, Completion]
ApiResponse = Response[bytes] | Stream

EVENT_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}


class AnswerForm(ChunkForm, Protocol):
    """Writes an answer in the form of one route."""

    def whole(self, deltas: Sequence[Delta], usage: Usage) -> msgspec.Struct: ...


async def respond(
    receive: Receive, start: Start, form: AnswerForm, metrics: EndpointMetrics, *, stream: bool
) -> ApiResponse:
    """Return the response to a request for answers, and cancel them if the client goes away.

    Args:
        receive: Of the request, whose body was read.
        start: Starts the completion.
        form: Writes it.
        metrics: Where it is counted.
        stream: As events; the response begins with the first token.

    Raises:
        ClientGone: The client disconnected first.
        PalsError: The completion failed before anything was sent.
    """
    answering = _streamed(start, form, metrics) if stream else _whole(start, form, metrics)
    return await unless_disconnected(receive, answering)


async def _whole(start: Start, form: AnswerForm, metrics: EndpointMetrics) -> ApiResponse:
    async with Running(await start, metrics) as completion:
        deltas = [delta async for delta in completion]
        answer = form.whole(deltas, usage_of(completion))
        headers = answer_headers(completion)
    return Response(msgspec.json.encode(answer), media_type=JSON_TYPE, headers=headers)


async def _streamed(start: Start, form: AnswerForm, metrics: EndpointMetrics) -> ApiResponse:
    """Return the response once the first text is there, or its failure is known."""
    running = Running(await start, metrics)
    try:
        deltas = await primed(aiter(running.completion), wait_s=HEARTBEAT_S)
    except BaseException:
        await running.aclose()
        raise
    return Stream(
        with_heartbeats(events(running, deltas, form)),
        media_type="text/event-stream",
        headers=EVENT_HEADERS | answer_headers(running.completion),
        # A generator that was never begun has no `finally`: the client left too early.
        background=BackgroundTask(running.aclose),
    )
