"""The answers to one prompt while they are made."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence

from pals.driver.answers import AnswerReader
from pals.driver.choices import ChoiceSessions
from pals.driver.interface import Delta, Timings
from pals.driver.state import ClientSession
from pals.types import short_id

KnownTimes = Callable[[], Mapping[str, float]]
"""Returns the milliseconds that each shard lately took for a token, by its peer."""


class LocalCompletion:
    """Answers over sessions; implements `pals.driver.interface.Completion`.

    Args:
        sessions: Of which the first is open.
        readers: One an answer.
        before: What each answer begins with, before any token is sampled.
        prompt_tokens: Tokens of the prompt.
        asked_at: When it was asked for, on the clock of `time.perf_counter`.
        shard_times: What is known of the shards.
    """

    def __init__(
        self,
        sessions: ChoiceSessions,
        readers: Sequence[AnswerReader],
        *,
        before: Sequence[Delta] = (),
        prompt_tokens: int,
        asked_at: float,
        shard_times: KnownTimes,
    ) -> None:
        self._sessions = sessions
        self._readers = tuple(readers)
        self._before = tuple(before)
        self._asked_at = asked_at
        self._opened_at = time.perf_counter()
        self._first_at: float | None = None
        self._shard_times = shard_times
        self.prompt_tokens = prompt_tokens
        self.completion_tokens = 0
        self.cached_tokens = _cached(sessions.first)

    @property
    def reasoning_tokens(self) -> int:
        return sum(reader.reasoning_tokens for reader in self._readers)

    @property
    def route(self) -> tuple[str, ...]:
        hops = self._sessions.first.chain.hops
        return tuple(f"{short_id(hop.peer)}[{hop.layers}]" for hop in hops)

    def timings(self) -> Timings:
        first, known = self._first_at, self._shard_times()
        hops = zip(self.route, self._sessions.first.chain.hops, strict=True)
        return Timings(
            open_ms=1000 * (self._opened_at - self._asked_at),
            first_token_ms=None if first is None else 1000 * (first - self._opened_at),
            shards=tuple((n, known[h.peer]) for n, h in hops if h.peer in known),
        )

    async def __aiter__(self) -> AsyncIterator[Delta]:
        try:
            for delta in self._before:
                yield delta
            while not all(reader.finished for reader in self._readers):
                delta = await self._next()
                if delta is not None:
                    yield delta
        finally:
            await self.aclose()

    async def aclose(self) -> None:
        self._sessions.close_all()

    async def _next(self) -> Delta | None:
        """Return what the next token adds; None where its answer is over already."""
        choice, sampled = await self._sessions.next()
        if self._first_at is None:
            self._first_at = time.perf_counter()
        reader = self._readers[choice]
        if reader.finished:
            return None
        self.completion_tokens += 1
        delta = reader.push(sampled)
        if reader.finished:
            self._sessions.close(choice)
        return delta


def _cached(session: ClientSession) -> int:
    """Return how much of its prompt a session that is open did not have to send."""
    return session.attempt.start


class PromptOnly:
    """Answers without a token of their own: what was asked for is the prompt."""

    def __init__(self, deltas: Sequence[Delta], *, prompt_tokens: int) -> None:
        self._deltas = tuple(deltas)
        self.prompt_tokens = prompt_tokens
        self.completion_tokens = 0
        self.cached_tokens = 0
        self.reasoning_tokens = 0
        self.route: tuple[str, ...] = ()

    def timings(self) -> Timings:
        return Timings(open_ms=0.0)

    async def __aiter__(self) -> AsyncIterator[Delta]:
        for delta in self._deltas:
            yield delta

    async def aclose(self) -> None:
        pass
