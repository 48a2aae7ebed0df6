"""The driver of one process: messages in, text out, over sessions on the trio thread."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from functools import partial

from pals.driver.bridge import TrioThread, post_to
from pals.driver.interface import FinishReason, GenerateParams, HopReport, Message, TextDelta
from pals.driver.routes import ServedModel
from pals.driver.sessions import SessionClient
from pals.driver.state import ClientSession, SampledToken, SessionEvent, SessionRequest
from pals.errors import PalsError
from pals.text.detokenize import StreamDetokenizer
from pals.text.stop import StopStrings
from pals.text.template import ChatTemplate
from pals.text.tokenizer import Tokenizer
from pals.types import Sampling, short_id


class LocalDriver:
    """Answers conversations; implements `pals.driver.interface.Driver`.

    Args:
        network: The trio thread on which the sessions live.
        model: The model it drives.
        tokenizer: The model's tokenizer.
        template: The model's chat template.
        eos_token_ids: Ids that end an answer.
    """

    def __init__(
        self,
        network: TrioThread[object],
        client: SessionClient,
        model: ServedModel,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        *,
        eos_token_ids: Iterable[int],
    ) -> None:
        self._network = network
        self._client = client
        self._model = model
        self._tokenizer = tokenizer
        self._template = template
        self._eos_token_ids = tuple(sorted(eos_token_ids))
        self.created = int(time.time())

    @property
    def model_id(self) -> str:
        return self._model.model_id

    async def chat(self, messages: Sequence[Message], params: GenerateParams) -> LocalCompletion:
        """Start a completion; see `pals.driver.interface.Driver.chat` for what it raises."""
        prompt = await asyncio.to_thread(self._encode, messages)
        request = SessionRequest(
            prompt=prompt,
            max_new_tokens=params.max_tokens,
            stop_token_ids=self._eos_token_ids,
            sampling=Sampling(
                temperature=params.temperature,
                top_p=params.top_p,
                seed=secrets.randbits(64) if params.seed is None else params.seed % (1 << 64),
            ),
        )
        events: asyncio.Queue[SessionEvent] = asyncio.Queue()
        sink = partial(_put_soon, asyncio.get_running_loop(), events)
        session = await self._network.call(
            partial(self._client.open, request, sink), on_lost=self._client.close
        )
        return LocalCompletion(
            self._network,
            self._client,
            session,
            events,
            text=_TextStream(self._tokenizer, params.stop, self._eos_token_ids),
            prompt_tokens=len(prompt),
        )

    async def report(self) -> list[HopReport]:
        """Return how the shards of the last used chain did lately, head first."""
        return await self._network.call(self._client.report)

    def _encode(self, messages: Sequence[Message]) -> tuple[int, ...]:
        turns = [{"role": m.role, "content": m.content} for m in messages]
        text = self._template.render(turns)
        return tuple(self._tokenizer.encode_prompt(text))


def _put_soon(
    loop: asyncio.AbstractEventLoop, events: asyncio.Queue[SessionEvent], event: SessionEvent
) -> None:
    post_to(loop, partial(events.put_nowait, event))


class _TextStream:
    """Turns sampled tokens into text that may be shown, and knows when it ends."""

    def __init__(
        self, tokenizer: Tokenizer, stops: Sequence[str], eos_token_ids: Sequence[int]
    ) -> None:
        self._detokenizer = StreamDetokenizer(tokenizer)
        self._stops = StopStrings(stops)
        self._eos = frozenset(eos_token_ids)

    def push(self, token: int, *, last: bool) -> TextDelta:
        """Add one token; a delta with a finish reason is the last one."""
        if token in self._eos:
            return self._finish("", "stop")
        text, hit = self._stops.push(self._detokenizer.push(token))
        if hit:
            return TextDelta(text=text, finish_reason="stop")
        return self._finish(text, "length") if last else TextDelta(text=text)

    def _finish(self, text: str, reason: FinishReason) -> TextDelta:
        """Release what was held back: it is no part of a stop string after all."""
        more, hit = self._stops.push(self._detokenizer.finish())
        if hit:
            return TextDelta(text=text + more, finish_reason="stop")
        return TextDelta(text=text + more + self._stops.finish(), finish_reason=reason)


class LocalCompletion:
    """One running completion; implements `pals.driver.interface.Completion`."""

    def __init__(
        self,
        network: TrioThread[object],
        client: SessionClient,
        session: ClientSession,
        events: asyncio.Queue[SessionEvent],
        *,
        text: _TextStream,
        prompt_tokens: int,
    ) -> None:
        self._network = network
        self._client = client
        self._session = session
        self._events = events
        self._text = text
        self._completion_tokens = 0
        self.prompt_tokens = prompt_tokens

    @property
    def completion_tokens(self) -> int:
        return self._completion_tokens

    @property
    def route(self) -> tuple[str, ...]:
        hops = self._session.chain.hops
        return tuple(f"{short_id(hop.peer)}[{hop.layers}]" for hop in hops)

    async def __aiter__(self) -> AsyncIterator[TextDelta]:
        try:
            while True:
                delta = await self._next()
                yield delta
                if delta.finish_reason is not None:
                    return
        finally:
            await self.aclose()

    async def aclose(self) -> None:
        self._network.post(partial(self._client.close, self._session))

    async def _next(self) -> TextDelta:
        event = await self._events.get()
        if isinstance(event, PalsError):
            raise event
        assert isinstance(event, SampledToken)
        self._completion_tokens += 1
        return self._text.push(event.token, last=event.last)
