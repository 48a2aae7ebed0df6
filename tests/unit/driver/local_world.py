"""A driver on a network that says what a test tells it to."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from pals.driver.interface import Completion, Delta, GenerateParams, HopReport, Message, Prompt
from pals.driver.local import LocalDriver
from pals.driver.routes import ServedModel
from pals.driver.state import SampledToken, SessionRequest, Sink
from pals.text.answers.format import AnswerFormat
from pals.text.answers.pieces import Content
from pals.text.tokenizer import Tokenizer
from pals.types import Sampling

WAIT_S = 10.0
VOCAB = 300
MODEL = ServedModel(
    model_id="test/tiny",
    manifest=bytes(32),
    num_layers=4,
    max_position_embeddings=64,
    hidden_size=8,
)
HOPS = [SimpleNamespace(peer=f"peer-{i}-abcdefgh", layers=f"{i}:{i + 1}") for i in (1, 2)]


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))


def eos_of(tokenizer: Tokenizer) -> int:
    [eos] = tokenizer.eos_token_ids
    return eos


def text_of(delta: Delta) -> str:
    return "".join(piece.text for piece in delta.pieces if isinstance(piece, Content))


def joined(deltas: Sequence[Delta]) -> tuple[str, str | None]:
    return "".join(map(text_of, deltas)), deltas[-1].finish_reason


class FakeNetwork:
    """Runs on the asyncio loop what would run on the trio thread."""

    def post(self, function: Callable[[], object]) -> None:
        function()

    async def call(
        self, function: Callable[[], Awaitable[Any]], *, on_lost: Callable[[Any], object] = id
    ) -> Any:
        del on_lost
        return await function()


class FakeClient:
    """Opens sessions that say what a test puts into their sinks.

    Attributes:
        opened: Gets each session that is opened or forked.
        answer: Called with the request of each session that is opened, for its tokens.
    """

    def __init__(self) -> None:
        self.requests: list[SessionRequest] = []
        self.forks: list[tuple[object, Sampling]] = []
        self.sinks: list[Sink] = []
        self.sessions: list[SimpleNamespace] = []
        self.opened: asyncio.Queue[object] = asyncio.Queue()
        self.closed: list[object] = []
        self.refusal: Exception | None = None
        self.fork_refusal: Exception | None = None
        self.answer: Callable[[SessionRequest], Sequence[SampledToken]] = lambda _: ()
        self.embedded: list[tuple[int, ...]] = []
        self.reports: list[HopReport] = []

    async def open(self, request: SessionRequest, sink: Sink) -> object:
        if self.refusal is not None:
            raise self.refusal
        self.requests.append(request)
        session = self._session(sink)
        for token in self.answer(request):
            sink(token)
        return session

    async def fork(self, parent: object, sampling: Sampling, sink: Sink) -> object:
        if self.fork_refusal is not None:
            raise self.fork_refusal
        self.forks.append((parent, sampling))
        return self._session(sink)

    def _session(self, sink: Sink) -> SimpleNamespace:
        chain = SimpleNamespace(hops=HOPS, tail=HOPS[-1])
        self.sinks.append(sink)
        self.sessions.append(SimpleNamespace(chain=chain, attempt=SimpleNamespace(start=2)))
        self.opened.put_nowait(self.sessions[-1])
        return self.sessions[-1]

    async def embed(self, prompt: tuple[int, ...]) -> object:
        if self.refusal is not None:
            raise self.refusal
        self.embedded.append(prompt)
        return np.full(4, len(prompt), np.float32)

    def close(self, session: object) -> None:
        self.closed.append(session)

    async def report(self) -> list[HopReport]:
        return self.reports


class FakeTemplate:
    """Joins the contents of the messages, and keeps what else it was asked for."""

    def render(self, messages: Sequence[dict[str, str]], **asked: object) -> str:
        self.turns, self.asked = messages, asked
        return "".join(message["content"] for message in messages)


class Bench:
    """A driver on a fake network."""

    def __init__(
        self, tokenizer: Tokenizer, answers: AnswerFormat | None = None, grammars: Any = None
    ) -> None:
        self.tokenizer = tokenizer
        self.client = FakeClient()
        self.template = FakeTemplate()
        network: Any = FakeNetwork()
        client: Any = self.client
        template: Any = self.template
        self.driver = LocalDriver(
            network,
            client,
            MODEL,
            tokenizer,
            template,
            eos_token_ids=[eos_of(tokenizer), 3],
            vocab_size=VOCAB,
            answers=answers,
            grammars=grammars,
        )

    async def chat(self, text: str = "hey", **params: Any) -> Completion:
        messages = [Message(role="user", content=text)]
        return await self.driver.chat(messages, GenerateParams(**params))

    async def complete(self, prompt: Prompt = "hey", **params: Any) -> Completion:
        return await self.driver.complete(prompt, GenerateParams(**params))

    def say(self, *tokens: int, last: bool = False, choice: int = -1, **scores: Any) -> None:
        """Let the tail sample tokens; with ``last`` it stops after them."""
        for index, token in enumerate(tokens, start=1):
            is_last = last and index == len(tokens)
            self.client.sinks[choice](SampledToken(token, is_last, **scores))


def run(main: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(WAIT_S):
            await main()

    asyncio.run(bounded())


async def collect(
    completion: Completion, shown: list[Delta] | None = None
) -> tuple[str, str | None]:
    """Read a completion to its end; ``shown`` also has what came before an error."""
    deltas = [] if shown is None else shown
    async for delta in completion:
        deltas.append(delta)  # a comprehension would lose what came before an error
    return joined(deltas)
