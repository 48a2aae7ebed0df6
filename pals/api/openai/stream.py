"""A completion as server-sent events, and what happens when the client goes away."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Sequence
from typing import Protocol, TypeVar

import anyio
import msgspec
from litestar.types import Receive

from pals.api.openai.running import Running, usage_of
from pals.api.openai.schema.shared import Usage
from pals.api.problems import problem_json
from pals.driver.interface import Delta
from pals.errors import PalsError

HEARTBEAT_S = 15.0

_LOG = logging.getLogger(__name__)
_T = TypeVar("_T")


class ClientGone(Exception):
    """The client disconnected before its answer was ready; there is nobody to tell."""


class ChunkForm(Protocol):
    """Writes the chunks of one stream."""

    def chunks(self, delta: Delta) -> Sequence[msgspec.Struct]: ...

    def usage_chunk(self, usage: Usage) -> msgspec.Struct | None:
        """Return the last chunk, where the request asks for it."""
        ...


async def unless_disconnected(receive: Receive, work: Coroutine[object, None, _T]) -> _T:
    """Run ``work`` and return its result; cancel it when the client disconnects.

    Raises:
        ClientGone: The client disconnected first.
    """
    worker = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({worker, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not worker.done():
            raise ClientGone
        return worker.result()
    finally:
        worker.cancel()
        watcher.cancel()
        await asyncio.gather(worker, watcher, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def primed(deltas: AsyncIterator[Delta], *, wait_s: float) -> AsyncIterator[Delta]:
    """Wait for the first delta, but no longer than ``wait_s``, and return all of them.

    A failure until then is raised here, where the response still can have a status.
    """
    first = asyncio.ensure_future(anext(deltas, None))
    try:
        await asyncio.wait({first}, timeout=wait_s)
    except asyncio.CancelledError:
        first.cancel()
        raise
    if first.done():
        first.result()
    return _chain(first, deltas)


async def _chain(
    first: asyncio.Future[Delta | None], deltas: AsyncIterator[Delta]
) -> AsyncIterator[Delta]:
    delta = await first
    while delta is not None:
        yield delta
        delta = await anext(deltas, None)


async def events(
    running: Running, deltas: AsyncIterator[Delta], form: ChunkForm
) -> AsyncGenerator[bytes]:
    """Yield the events of a completion, an error in its place among them."""
    async with running as completion:
        try:
            async for delta in deltas:
                for chunk in form.chunks(delta):
                    yield _event(msgspec.json.encode(chunk))
        except PalsError as error:
            yield _event(problem_json(error))
            return
        # The status line is long gone: an event is the only place left for a failure.
        except Exception as error:
            _LOG.error("stream failed: %s", type(error).__name__)
            yield _event(problem_json(PalsError()))
            return
        last = form.usage_chunk(usage_of(completion))
        if last is not None:
            yield _event(msgspec.json.encode(last))
        yield _event(b"[DONE]")


async def with_heartbeats(
    events: AsyncGenerator[bytes], *, interval_s: float = HEARTBEAT_S
) -> AsyncGenerator[bytes]:
    """Yield ``events``, and a comment whenever none came for ``interval_s``.

    Proxies and clients cut a connection that is silent for long, as a long prompt makes it.
    """
    pending = asyncio.ensure_future(anext(events, None))
    try:
        while True:
            done, _ = await asyncio.wait({pending}, timeout=interval_s)
            if not done:
                yield b": waiting\n\n"
                continue
            event = pending.result()
            if event is None:
                return
            yield event
            pending = asyncio.ensure_future(anext(events, None))
    finally:
        pending.cancel()
        with anyio.CancelScope(shield=True):
            await asyncio.gather(pending, return_exceptions=True)
            await events.aclose()


def _event(data: bytes) -> bytes:
    return b"data: " + data + b"\n\n"
