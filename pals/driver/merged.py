"""Several completions as one: the answers to the prompts of one request."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import replace

from pals.driver.interface import Completion, Delta, Timings

AT_ONCE = 8
MAX_WAITING_DELTAS = 64

Start = Callable[[], Awaitable[Completion]]


async def start_all(starts: Sequence[Start], *, n: int) -> Completion:
    """Start the answers to the first of several prompts, and the others' as it is read.

    Args:
        starts: One a prompt; few of them run at one time.
        n: Answers to each; those to the second begin with choice ``n``.

    Raises:
        PalsError: As the first of them does.
    """
    return _Merged(await starts[0](), starts[1:], n=n)


class _Merged:
    def __init__(self, first: Completion, rest: Sequence[Start], *, n: int) -> None:
        async def given() -> Completion:
            return first

        self._first = first
        self._n = n
        self._completions = [first]
        self._unstarted = deque(enumerate([given, *rest]))
        self._total = len(self._unstarted)
        self._deltas: asyncio.Queue[Delta | Exception | None] = asyncio.Queue(MAX_WAITING_DELTAS)
        self._workers: list[asyncio.Task[None]] = []

    @property
    def prompt_tokens(self) -> int:
        return sum(each.prompt_tokens for each in self._completions)

    @property
    def completion_tokens(self) -> int:
        return sum(each.completion_tokens for each in self._completions)

    @property
    def cached_tokens(self) -> int:
        return sum(each.cached_tokens for each in self._completions)

    @property
    def reasoning_tokens(self) -> int:
        return sum(each.reasoning_tokens for each in self._completions)

    @property
    def route(self) -> tuple[str, ...]:
        return self._first.route

    def timings(self) -> Timings:
        return self._first.timings()

    async def __aiter__(self) -> AsyncIterator[Delta]:
        workers = min(AT_ONCE, self._total)
        self._workers = [asyncio.create_task(self._work()) for _ in range(workers)]
        ended = 0
        try:
            while ended < self._total:
                event = await self._deltas.get()
                if isinstance(event, Exception):
                    raise event
                if event is None:
                    ended += 1
                else:
                    yield event
        finally:
            await self.aclose()

    async def aclose(self) -> None:
        for worker in self._workers:
            worker.cancel()
        await asyncio.gather(*self._workers, return_exceptions=True)
        for completion in self._completions:
            await completion.aclose()

    async def _work(self) -> None:
        while self._unstarted:
            index, start = self._unstarted.popleft()
            try:
                await self._run(index, start)
            except Exception as error:  # it belongs to whoever reads the deltas
                await self._deltas.put(error)
                return
            await self._deltas.put(None)

    async def _run(self, index: int, start: Start) -> None:
        completion = await start()
        if completion is not self._first:
            self._completions.append(completion)
        async for delta in completion:
            await self._deltas.put(replace(delta, choice=index * self._n + delta.choice))
