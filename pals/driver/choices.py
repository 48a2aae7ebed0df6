"""The sessions that make the answers to one prompt, seen from the asyncio side."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial

from pals.driver.bridge import TrioThread, post_to
from pals.driver.sessions import SessionClient
from pals.driver.state import ClientSession, SampledToken, SessionEvent, SessionRequest
from pals.errors import PalsError
from pals.types import Sampling


class ChoiceSessions:
    """One session an answer, all over the pages of one prompt.

    The first is opened; the others fork from it as soon as it has a token, since the chain
    has the whole prompt then.

    Args:
        network: The trio thread on which the sessions live.
        client: Opens them.
        request: The first of them.
        others: How the other answers are sampled.
    """

    def __init__(
        self,
        network: TrioThread[object],
        client: SessionClient,
        request: SessionRequest,
        others: Sequence[Sampling],
    ) -> None:
        self._network = network
        self._client = client
        self._request = request
        self._others = tuple(others)
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, SessionEvent]] = asyncio.Queue()
        self._sessions: dict[int, ClientSession] = {}
        self._open: set[int] = set()
        self._forking: asyncio.Task[None] | None = None
        self._closed = False

    @property
    def first(self) -> ClientSession:
        """The session of the first answer, once it is open."""
        return self._sessions[0]

    async def open(self) -> None:
        """Open the first session.

        Raises:
            PalsError: As `SessionClient.open` does.
        """
        open_first = partial(self._client.open, self._request, self._sink(0))
        self._keep(0, await self._network.call(open_first, on_lost=self._client.close))

    async def next(self) -> tuple[int, SampledToken]:
        """Return the next token of any answer, and which one's it is.

        Raises:
            PalsError: A session is over before its answer is.
        """
        choice, event = await self._events.get()
        if isinstance(event, PalsError):
            raise event
        if self._others and self._forking is None:
            self._forking = asyncio.create_task(self._fork())
        return choice, event

    def close(self, choice: int) -> None:
        """Free the session of one answer on every shard."""
        if choice in self._open:
            self._open.discard(choice)
            self._network.post(partial(self._client.close, self._sessions[choice]))

    def close_all(self) -> None:
        """Free all of them; may be called at any time and twice."""
        self._closed = True
        if self._forking is not None:
            self._forking.cancel()
        for choice in list(self._open):
            self.close(choice)

    async def _fork(self) -> None:
        forks = (self._fork_one(i, s) for i, s in enumerate(self._others, start=1))
        await asyncio.gather(*forks)

    async def _fork_one(self, choice: int, sampling: Sampling) -> None:
        fork = partial(self._client.fork, self.first, sampling, self._sink(choice))
        try:
            session = await self._network.call(fork, on_lost=self._client.close)
        except PalsError as error:
            self._events.put_nowait((choice, error))
            return
        self._keep(choice, session)

    def _keep(self, choice: int, session: ClientSession) -> None:
        self._sessions[choice] = session
        self._open.add(choice)
        if self._closed:
            self.close(choice)

    def _sink(self, choice: int) -> _Sink:
        return _Sink(self._loop, self._events, choice)


class _Sink:
    """Takes the events of one session on the trio thread."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        events: asyncio.Queue[tuple[int, SessionEvent]],
        choice: int,
    ) -> None:
        self._loop = loop
        self._events = events
        self._choice = choice

    def __call__(self, event: SessionEvent) -> None:
        post_to(self._loop, partial(self._events.put_nowait, (self._choice, event)))
