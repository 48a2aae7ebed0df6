"""A completion as server-sent events, and what happens when the client goes away."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import TypeVar

import anyio
import msgspec
from litestar.types import Receive

from pals.api.openai.schema import Chunk, ChunkChoice, Delta, Usage
from pals.api.problems import problem_json
from pals.driver.interface import Completion
from pals.driver.interface import Delta as AnswerDelta
from pals.errors import PalsError
from pals.text.answers.pieces import Content

HEARTBEAT_S = 15.0
CLOSE_DEADLINE_S = 5.0

_LOG = logging.getLogger(__name__)
_T = TypeVar("_T")


class ClientGone(Exception):
    """The client disconnected before its answer was ready; there is nobody to tell."""


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


@asynccontextmanager
async def closing(completion: Completion) -> AsyncGenerator[Completion]:
    """Free the completion's sessions at the end, also when the request is cancelled."""
    try:
        yield completion
    finally:
        with anyio.move_on_after(CLOSE_DEADLINE_S, shield=True):
            await completion.aclose()


async def primed(
    deltas: AsyncIterator[AnswerDelta], *, wait_s: float
) -> AsyncIterator[AnswerDelta]:
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
    first: asyncio.Future[AnswerDelta | None], deltas: AsyncIterator[AnswerDelta]
) -> AsyncIterator[AnswerDelta]:
    delta = await first
    while delta is not None:
        yield delta
        delta = await anext(deltas, None)


class ChunkWriter:
    """Writes the chunks of one stream, which share their head."""

    def __init__(self, completion: Completion, head: Chunk, *, include_usage: bool) -> None:
        self._completion = completion
        self._include_usage = include_usage
        self._head = msgspec.structs.replace(head, usage=None) if include_usage else head

    async def events(self, deltas: AsyncIterator[AnswerDelta]) -> AsyncGenerator[bytes]:
        """Yield the events of a completion, an error in its place among them.

        The role comes with the first text, so that nothing is sent before a token is.
        """
        async with closing(self._completion):
            role = True
            try:
                async for delta in deltas:
                    if role:
                        yield self._chunk(Delta(role="assistant", content=""))
                        role = False
                    for chunk in self._text_chunks(delta):
                        yield chunk
            except PalsError as error:
                yield _event(problem_json(error))
                return
            # The status line is long gone: an event is the only place left for a failure.
            except Exception as error:
                _LOG.error("stream failed: %s", type(error).__name__)
                yield _event(problem_json(PalsError()))
                return
            if self._include_usage:
                yield self._usage_chunk()
            yield _event(b"[DONE]")

    def _text_chunks(self, delta: AnswerDelta) -> list[bytes]:
        text = content_of(delta)
        chunks = [self._chunk(Delta(content=text))] if text else []
        if delta.finish_reason is not None:
            chunks.append(self._chunk(Delta(), delta.finish_reason))
        return chunks

    def _chunk(self, delta: Delta, finish_reason: str | None = None) -> bytes:
        choice = ChunkChoice(delta=delta, finish_reason=finish_reason)
        return _event(msgspec.json.encode(msgspec.structs.replace(self._head, choices=[choice])))

    def _usage_chunk(self) -> bytes:
        usage = usage_of(self._completion)
        return _event(msgspec.json.encode(msgspec.structs.replace(self._head, usage=usage)))


def content_of(delta: AnswerDelta) -> str:
    """Return the text for the reader in a delta."""
    return "".join(piece.text for piece in delta.pieces if isinstance(piece, Content))


def usage_of(completion: Completion) -> Usage:
    """Return the tokens a completion has taken so far."""
    prompt, answer = completion.prompt_tokens, completion.completion_tokens
    return Usage(prompt_tokens=prompt, completion_tokens=answer, total_tokens=prompt + answer)


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
