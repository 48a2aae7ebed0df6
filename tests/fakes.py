"""Stand-ins for the parts a test does not exercise."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable, Sequence

import anyio

from pals.driver.interface import Completion, GenerateParams, HopReport, Message, TextDelta
from pals.errors import PalsError


class FakeCompletion:
    """Plays a script: text pieces, then a finish reason, an error, or silence for ever."""

    def __init__(
        self, pieces: Sequence[str], *, end: PalsError | str | None, on_close: Callable[[], None]
    ) -> None:
        self.prompt_tokens = 7
        self.completion_tokens = 0
        self.route = ("peer-a 0:2", "peer-b 2:4")
        self.closed = threading.Event()
        self._pieces = pieces
        self._end = end
        self._on_close = on_close

    async def __aiter__(self) -> AsyncIterator[TextDelta]:
        for piece in self._pieces:
            self.completion_tokens += 1
            yield TextDelta(text=piece)
        if isinstance(self._end, PalsError):
            raise self._end
        if self._end is None:
            await anyio.sleep_forever()
        yield TextDelta(text="", finish_reason=self._end)

    async def aclose(self) -> None:
        self.closed.set()
        self._on_close()


class FakeDriver:
    """A `Driver` whose answers are fixed; it records what it was asked."""

    model_id = "test/tiny"
    created = 1_700_000_000

    def __init__(
        self, pieces: Sequence[str] = ("Hel", "lo", "!"), *, end: PalsError | str | None = "stop"
    ) -> None:
        self.pieces = pieces
        self.end = end
        self.refusal: Exception | None = None
        self.asked = threading.Event()
        self.on_close: Callable[[], None] = lambda: None
        self.calls: list[tuple[tuple[Message, ...], GenerateParams]] = []
        self.completions: list[FakeCompletion] = []

    async def chat(self, messages: Sequence[Message], params: GenerateParams) -> Completion:
        self.calls.append((tuple(messages), params))
        if self.refusal is not None:
            raise self.refusal
        completion = FakeCompletion(self.pieces, end=self.end, on_close=self.on_close)
        self.completions.append(completion)
        self.asked.set()
        return completion

    async def report(self) -> Sequence[HopReport]:
        return [
            HopReport(
                peer="peer-a",
                layers="0:2",
                steps=3,
                step_ms=2.0,
                queue_ms=0.1,
                handover_ms=0.4,
                codec_ms=0.2,
                wire_ms=0.3,
            )
        ]
