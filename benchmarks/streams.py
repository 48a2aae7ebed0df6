"""Sessions of a driver in this process, without HTTP, and when their tokens come."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import trio

from pals.driver.sessions import SessionClient
from pals.driver.state import ClientSession, SampledToken, SessionEvent, SessionRequest
from pals.errors import PalsError
from pals.types import Sampling

TOKEN_DEADLINE_S = 300.0
FIRST_ID, LAST_ID = 100, 40_000
"""Token ids of prompts: ordinary ones of the demo's model."""


class Prompts:
    """Prompts no two of which begin alike, so that no shard knows one; the same in every run."""

    def __init__(self) -> None:
        self._drawn = 0

    def draw(self, tokens: int) -> tuple[int, ...]:
        self._drawn += 1
        ids = np.random.default_rng(self._drawn).integers(FIRST_ID, LAST_ID, tokens)
        return tuple(ids.tolist())


class Stream:
    """One session; made by `open_stream`.

    Attributes:
        arrivals_s: When its tokens came, after it was opened.
    """

    def __init__(self, client: SessionClient) -> None:
        self.arrivals_s: list[float] = []
        self._client = client
        self._session: ClientSession | None = None
        self._error: PalsError | None = None
        self._changed = trio.Event()
        self._started_s = time.perf_counter()

    async def open(self, request: SessionRequest) -> None:
        self._session = await self._client.open(request, self._take)

    def _take(self, event: SessionEvent) -> None:
        if isinstance(event, SampledToken):
            self.arrivals_s.append(time.perf_counter() - self._started_s)
        else:
            self._error = event
        self._changed.set()

    async def wait_for(self, tokens: int) -> None:
        """Wait until so many tokens have come.

        Raises:
            PalsError: The session ended before.
            TooSlowError: It took longer than `TOKEN_DEADLINE_S`.
        """
        with trio.fail_after(TOKEN_DEADLINE_S):
            while len(self.arrivals_s) < tokens:
                if self._error is not None:
                    raise self._error
                self._changed = trio.Event()
                await self._changed.wait()

    def close(self) -> None:
        """End the session, wherever it is."""
        if self._session is not None:
            self._client.close(self._session)


async def open_stream(client: SessionClient, prompt: Sequence[int], max_tokens: int) -> Stream:
    """Open a greedy session.

    Raises:
        PalsError: It was not taken.
    """
    stream = Stream(client)
    request = SessionRequest(
        prompt=tuple(prompt),
        max_new_tokens=max_tokens,
        stop_token_ids=(),
        sampling=Sampling(),
    )
    with trio.fail_after(TOKEN_DEADLINE_S):
        await stream.open(request)
    return stream


async def open_streams(
    client: SessionClient, prompts: Sequence[Sequence[int]], max_tokens: int
) -> list[Stream]:
    """Open greedy sessions side by side and wait until each has a token.

    Raises:
        PalsError: One was not taken, or ended.
    """
    streams: list[Stream] = []

    async def open_one(prompt: Sequence[int]) -> None:
        stream = await open_stream(client, prompt, max_tokens)
        streams.append(stream)
        await stream.wait_for(1)

    async with trio.open_nursery() as nursery:
        for prompt in prompts:
            nursery.start_soon(open_one, prompt)
    return streams
