"""Stand-ins for the parts a test does not exercise."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable, Sequence

import anyio
import numpy as np

from pals.driver.interface import (
    Completion,
    Delta,
    Embedding,
    GenerateParams,
    HopReport,
    Message,
    Prompt,
    Timings,
)
from pals.errors import PalsError
from pals.text.answers.pieces import Content

Script = Sequence[str | Delta]
End = PalsError | str | None


class FakeCompletion:
    """Plays a script: deltas or text, then a finish reason, an error, or silence for ever."""

    def __init__(self, script: Script, *, n: int, end: End, on_close: Callable[[], None]) -> None:
        self.prompt_tokens = 7
        self.completion_tokens = 0
        self.cached_tokens = 4
        self.reasoning_tokens = 0
        self.route = ("peer-a[0:2]", "peer-b[2:4]")
        self.closed = threading.Event()
        self._script = script
        self._n = n
        self._end = end
        self._on_close = on_close

    def timings(self) -> Timings:
        shards = (("peer-a[0:2]", 2.5), ("peer-b[2:4]", 3.25))
        return Timings(open_ms=1.5, first_token_ms=20.0, shards=shards)

    async def __aiter__(self) -> AsyncIterator[Delta]:
        for step in self._script:
            self.completion_tokens += 1
            if isinstance(step, Delta):
                yield step
                continue
            for choice in range(self._n):
                yield Delta(choice=choice, pieces=(Content(step),))
        if isinstance(self._end, PalsError):
            raise self._end
        if self._end is None:
            await anyio.sleep_forever()
        for choice in range(self._n):
            yield Delta(choice=choice, finish_reason=self._end)

    async def aclose(self) -> None:
        self.closed.set()
        self._on_close()


class FakeDriver:
    """A `Driver` whose answers are fixed; it records what it was asked."""

    model_id = "test/tiny"
    created = 1_700_000_000
    context_tokens = 64
    vocab_size = 100
    embedding_size = 4

    def __init__(self, script: Script = ("Hel", "lo", "!"), *, end: End = "stop") -> None:
        self.script = script
        self.end = end
        self.refusal: Exception | None = None
        self.asked = threading.Event()
        self.on_close: Callable[[], None] = lambda: None
        self.calls: list[tuple[tuple[Message, ...], GenerateParams]] = []
        self.prompts: list[tuple[Prompt, GenerateParams]] = []
        self.embedded: list[Prompt] = []
        self.completions: list[FakeCompletion] = []

    async def chat(self, messages: Sequence[Message], params: GenerateParams) -> Completion:
        self.calls.append((tuple(messages), params))
        return self._answer(params)

    async def complete(self, prompt: Prompt, params: GenerateParams) -> Completion:
        self.prompts.append((prompt, params))
        return self._answer(params)

    def _answer(self, params: GenerateParams) -> FakeCompletion:
        if self.refusal is not None:
            raise self.refusal
        completion = FakeCompletion(self.script, n=params.n, end=self.end, on_close=self.on_close)
        self.completions.append(completion)
        self.asked.set()
        return completion

    async def embed(self, inputs: Sequence[Prompt]) -> list[Embedding]:
        self.embedded += inputs
        if self.refusal is not None:
            raise self.refusal
        vector = np.array([3.0, 4.0, 12.0, 84.0], np.float32)
        return [Embedding(vector=vector, tokens=len(text)) for text in inputs]

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
