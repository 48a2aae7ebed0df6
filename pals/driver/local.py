"""The driver of one process: prompts in, pieces out, over sessions on the trio thread."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

from pals.driver.answers import AnswerReader, Reading
from pals.driver.best import BestOf
from pals.driver.bridge import TrioThread
from pals.driver.choices import ChoiceSessions
from pals.driver.completion import LocalCompletion, PromptOnly
from pals.driver.drawing import is_scored, made, sampling_of
from pals.driver.interface import (
    Completion,
    Delta,
    Embedding,
    GenerateParams,
    HopReport,
    Message,
    Prompt,
    TokenScore,
)
from pals.driver.routes import ServedModel
from pals.driver.scores import TokenScorer
from pals.driver.scoring import read_scores, scoring_request
from pals.driver.sessions import SessionClient
from pals.driver.shard_times import ShardTimes
from pals.driver.state import SessionRequest
from pals.driver.turns import turn_of
from pals.errors import InvalidGrammar, InvalidRequest
from pals.text.answers.format import AnswerFormat, PlainParser
from pals.text.answers.pieces import Content
from pals.text.grammar import GrammarChecker
from pals.text.template import ChatTemplate
from pals.text.tokenizer import Tokenizer
from pals.types import Grammar

TAIL_CHARACTERS = 256
"""Of a rendered prompt, for the parser: a template may have opened the reasoning."""
CONTEXT_TOKENS = 8
"""Of a prompt that an answer's text goes on with."""
EMBEDDINGS_AT_ONCE = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rendered:
    tokens: tuple[int, ...]
    tail: str


class LocalDriver:
    """Answers conversations and prompts; implements `pals.driver.interface.Driver`.

    Args:
        network: The trio thread on which the sessions live.
        client: Opens them.
        model: The model it drives.
        tokenizer: The model's tokenizer.
        template: The model's chat template.
        eos_token_ids: Ids that end an answer.
        vocab_size: Rows of the model's embedding; by default the tokenizer's.
        answers: How the model's family writes its answers.
        grammars: Says which grammars the shards can enforce; None leaves that to them.
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
        vocab_size: int | None = None,
        answers: AnswerFormat | None = None,
        grammars: GrammarChecker | None = None,
    ) -> None:
        self._network = network
        self._client = client
        self._model = model
        self._tokenizer = tokenizer
        self._template = template
        self._eos_token_ids = tuple(sorted(eos_token_ids))
        self._answers = answers or AnswerFormat()
        self._grammars = grammars
        self._checking = ThreadPoolExecutor(1, "pals-grammars")
        self._scorer = TokenScorer(tokenizer)
        self._times = ShardTimes(self.report)
        self.vocab_size = vocab_size or tokenizer.vocab_size
        self.created = int(time.time())

    @property
    def model_id(self) -> str:
        return self._model.model_id

    @property
    def context_tokens(self) -> int:
        return self._model.max_position_embeddings

    @property
    def embedding_size(self) -> int:
        return self._model.hidden_size

    async def chat(self, messages: Sequence[Message], params: GenerateParams) -> Completion:
        """Start answers; see `pals.driver.interface.Driver.chat` for what it raises."""
        asked_at, use = time.perf_counter(), params.tools
        prompt = await asyncio.to_thread(self._render, messages, params)
        grammar = await self._grammar(params, prompt.tail)
        reading = self._reading(params, kept_tokens=self._answers.kept_tokens)
        readers = [
            AnswerReader(i, reading, self._answers.parser(use, prompt_tail=prompt.tail))
            for i in range(made(params))
        ]
        request = self._request(prompt.tokens, params, grammar)
        return await self._start(request, params, readers, asked_at=asked_at)

    async def complete(self, prompt: Prompt, params: GenerateParams) -> Completion:
        """Start answers; see `pals.driver.interface.Driver.complete` for what it raises."""
        asked_at = time.perf_counter()
        tokens = await asyncio.to_thread(self._tokens_of, prompt, "prompt")
        before = await self._echo(prompt, tokens, params)
        if params.max_tokens == 0:
            return PromptOnly(_ended(before, params.n), prompt_tokens=len(tokens))
        context = [t for t in tokens if not self._tokenizer.is_skipped(t)][-CONTEXT_TOKENS:]
        reading = self._reading(params, context=tuple(context))
        readers = [AnswerReader(i, reading, PlainParser()) for i in range(made(params))]
        request = self._request(tokens, params, params.grammar)
        return await self._start(request, params, readers, before=before, asked_at=asked_at)

    async def embed(self, inputs: Sequence[Prompt]) -> list[Embedding]:
        """Return embeddings; see `pals.driver.interface.Driver.embed` for what it raises."""
        tokens = [await asyncio.to_thread(self._tokens_of, text, "input") for text in inputs]
        room = asyncio.Semaphore(EMBEDDINGS_AT_ONCE)
        tasks = [asyncio.create_task(self._embed(each, room)) for each in tokens]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    async def _embed(self, tokens: tuple[int, ...], room: asyncio.Semaphore) -> Embedding:
        async with room:
            vector = await self._network.call(partial(self._client.embed, tokens))
        return Embedding(vector=vector, tokens=len(tokens))

    async def report(self) -> list[HopReport]:
        """Return how the shards of the last used chain did lately, head first."""
        return await self._network.call(self._client.report)

    # --- prompts ---------------------------------------------------------------------

    def _render(self, messages: Sequence[Message], params: GenerateParams) -> _Rendered:
        text = self._template.render(
            self._answers.template_messages([turn_of(m) for m in messages], params.tools),
            tools=self._answers.template_tools(params.tools),
            reasoning_effort=params.reasoning_effort,
        )
        tokens = tuple(self._tokenizer.encode_prompt(text))
        return _Rendered(tokens=tokens, tail=text[-TAIL_CHARACTERS:])

    def _tokens_of(self, prompt: Prompt, param: str) -> tuple[int, ...]:
        text = isinstance(prompt, str)
        tokens = tuple(self._tokenizer.encode_prompt(prompt)) if text else prompt
        if not tokens:
            raise InvalidRequest(problem=f"`{param}` has no tokens", param=param)
        return tokens

    async def _echo(
        self, prompt: Prompt, tokens: tuple[int, ...], params: GenerateParams
    ) -> list[Delta]:
        """Return what each answer begins with; nothing where no echo is asked for."""
        if not params.echo:
            return []
        text = prompt if isinstance(prompt, str) else self._tokenizer.decode(tokens)
        scores: tuple[TokenScore, ...] = ()
        if params.logprobs is not None:
            scores = await self._score(tokens, params.logprobs)
        piece = (Content(text),) if text else ()
        return [Delta(choice=i, pieces=piece, scores=scores) for i in range(made(params))]

    async def _score(self, tokens: tuple[int, ...], logprobs: int) -> tuple[TokenScore, ...]:
        first = self._scorer.unscored(tokens[0])
        if len(tokens) == 1:
            return (first,)
        request = scoring_request(tokens, logprobs)
        sessions = ChoiceSessions(self._network, self._client, request, ())
        try:
            await sessions.open()
            return (first, *await read_scores(sessions, tokens, self._scorer))
        finally:
            sessions.close_all()

    async def _grammar(self, params: GenerateParams, prompt_tail: str) -> Grammar | None:
        """Return what an answer in a conversation may consist of, reasoning and calls included.

        Raises:
            InvalidGrammar: It cannot be enforced; so it is refused before a session opens.
        """
        if params.grammar is None and params.tools is None:
            return None
        write = partial(
            self._answers.grammar, params.tools, prompt_tail=prompt_tail, answer=params.grammar
        )
        try:
            grammar = await asyncio.to_thread(write)
            if grammar is not None:
                await self._check(grammar)
        except InvalidGrammar as error:
            param = "tools" if params.grammar is None else "response_format"
            raise InvalidGrammar(problem=str(error), param=param) from None
        return grammar

    async def _check(self, grammar: Grammar) -> None:
        if self._grammars is None or self._grammars.knows(grammar):
            return
        # On a thread of its own: each may take seconds, also when its client has gone.
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._checking, self._grammars.check, grammar)

    # --- answers ---------------------------------------------------------------------

    def _reading(
        self,
        params: GenerateParams,
        *,
        kept_tokens: frozenset[int] = frozenset(),
        context: tuple[int, ...] = (),
    ) -> Reading:
        return Reading(
            tokenizer=self._tokenizer,
            end_tokens=frozenset(self._eos_token_ids),
            kept_tokens=kept_tokens,
            stop=params.stop,
            scored=is_scored(params),
            context=context,
        )

    def _request(
        self, prompt: tuple[int, ...], params: GenerateParams, grammar: Grammar | None
    ) -> SessionRequest:
        return SessionRequest(
            prompt=prompt,
            max_new_tokens=params.max_tokens,
            stop_token_ids=self._eos_token_ids,
            sampling=sampling_of(params, 0),
            grammar=grammar,
        )

    async def _start(
        self,
        request: SessionRequest,
        params: GenerateParams,
        readers: Sequence[AnswerReader],
        *,
        before: Sequence[Delta] = (),
        asked_at: float,
    ) -> Completion:
        others = [sampling_of(params, choice) for choice in range(1, len(readers))]
        sessions = ChoiceSessions(self._network, self._client, request, others)
        await sessions.open()
        self._times.refresh()
        completion = LocalCompletion(
            sessions,
            readers,
            before=before,
            prompt_tokens=len(request.prompt),
            asked_at=asked_at,
            shard_times=self._times.known,
        )
        if len(readers) == params.n:
            return completion
        return BestOf(completion, n=params.n, scored=params.logprobs is not None)


def _ended(before: Sequence[Delta], n: int) -> list[Delta]:
    """Return answers that end where they begin."""
    empty = [Delta(choice=i) for i in range(n)]
    return [replace(delta, finish_reason="length") for delta in (before or empty)[:n]]
