"""What the HTTP API asks of a driver: a conversation or a prompt in, a stream of pieces out.

The API side of these calls is asyncio; a driver that lives on trio bridges them.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from pals.text.answers.pieces import Piece
from pals.text.answers.tools import ToolUse
from pals.types import Grammar

FinishReason = Literal["stop", "length", "tool_calls"]
"""Why an answer ended: a stop token or stop string, the token limit, or calls of tools."""

Prompt = str | tuple[int, ...]
"""Text, or token ids that are taken as they are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MadeCall:
    """A call of a tool in an earlier turn; ``arguments`` is JSON as the model wrote it."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One turn of a conversation, its content as plain text.

    Attributes:
        role: ``system``, ``developer``, ``user``, ``assistant`` or ``tool``.
        content: None where a turn of the assistant consists of calls alone.
        name: Of who speaks, or of the tool that answers.
        tool_call_id: Which call a turn of a tool answers.
        tool_calls: What a turn of the assistant called.
        reasoning_content: What it wrote to itself before.
    """

    role: str
    content: str | None
    name: str | None = None
    tool_call_id: str | None = None
    tool_calls: tuple[MadeCall, ...] = ()
    reasoning_content: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateParams:
    """How the answers to one prompt are made.

    Attributes:
        max_tokens: Most tokens of each answer; None means what the context has left.
        temperature: 0 is greedy. Range 0 to 2.
        top_p: Smallest probability mass to sample from, in (0, 1].
        top_k: Most tokens to choose from; 0 for all.
        min_p: Least probability of a token to choose, as a part of the likeliest one's.
        repetition_penalty: See `pals.types.Sampling`; so are the other two penalties.
        presence_penalty: Range -2 to 2.
        frequency_penalty: Range -2 to 2.
        logit_bias: Token ids and what is added to their logits.
        seed: Start of the random stream; None lets the driver draw one for each answer.
        stop: Up to 4 strings; the text ends before the first of them.
        logprobs: How many likeliest tokens to name beside each token's own log-probability,
            0 to 20; None where nobody asks for either.
        n: How many answers; the one with index ``i`` has ``seed + i``.
        best_of: Make so many and keep the ``n`` likeliest; None makes ``n``.
        grammar: What the answer may consist of.
        tools: What a conversation's answer may call.
        reasoning_effort: How long the model is to think, ``none`` to ``xhigh``, where its
            chat template knows of that.
        echo: The answers to a prompt begin with the prompt, scored if ``logprobs`` is given.
    """

    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    n: int = 1
    best_of: int | None = None
    grammar: Grammar | None = None
    tools: ToolUse | None = None
    reasoning_effort: str | None = None
    echo: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class TopScore:
    """One of the likeliest tokens at a place.

    Attributes:
        token: Its id.
        raw: The bytes that it stands for, perhaps a part of a character; of a special
            token its name.
        logprob: Natural logarithm of its probability.
    """

    token: int
    raw: bytes
    logprob: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenScore(TopScore):
    """A token of the answer, and the likeliest ones at its place, best first.

    Attributes:
        scored: False for the first token of a prompt, which follows upon nothing;
            ``logprob`` says nothing then.
        hidden: It is a special token, which the text does not show.
        top: As many as were asked for.
    """

    scored: bool = True
    hidden: bool = False
    top: tuple[TopScore, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """What one answer gains.

    Attributes:
        choice: Which answer, from 0.
        pieces: In order, and never part of a stop string.
        scores: Of the tokens whose text is out, where the request asks for them.
        finish_reason: Set on the last delta of each answer, and on no other.
    """

    choice: int = 0
    pieces: tuple[Piece, ...] = ()
    scores: tuple[TokenScore, ...] = ()
    finish_reason: FinishReason | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Embedding:
    """What a text is to the model.

    Attributes:
        vector: float32 ``[D]``, the mean of its last hidden states.
        tokens: How many tokens the text has.
    """

    vector: NDArray[np.float32]
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """Where the time of a completion went, in milliseconds.

    Attributes:
        open_ms: From the request until a chain had accepted it.
        first_token_ms: From then until the first token; None before it is there.
        shards: Each shard as in `Completion.route`, and its part of a token's time, as far
            as it is known.
    """

    open_ms: float
    first_token_ms: float | None = None
    shards: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class HopReport:
    """How one shard of a chain did lately; times are medians in milliseconds.

    Attributes:
        peer: The shard's peer.
        layers: Its layers, ``a:b``.
        steps: Decode steps since it started.
        step_ms: One decode step.
        queue_ms: What a row waits for a step before its own.
        handover_ms: From the network's thread to the step's, and back.
        codec_ms: Opening, sealing and shaping frames.
        wire_ms: The rest of a turn of the ring, shared equally by its hops.
    """

    peer: str
    layers: str
    steps: int
    step_ms: float
    queue_ms: float
    handover_ms: float
    codec_ms: float
    wire_ms: float


class Completion(Protocol):
    """The answers to one prompt, while they are made.

    Iterate once; each step may run in another task of the same loop, and cancelling a
    step ends the iteration. It ends after the last answer, and raises `PalsError` when a
    session fails on the way. `aclose` frees the sessions on every shard; it may be called at
    any time and twice.
    """

    @property
    def prompt_tokens(self) -> int: ...

    @property
    def completion_tokens(self) -> int:
        """Tokens generated so far, of all answers that were made."""
        ...

    @property
    def cached_tokens(self) -> int:
        """Tokens of the prompt that the chain had computed before."""
        ...

    @property
    def reasoning_tokens(self) -> int:
        """Tokens so far that the model wrote to itself."""
        ...

    @property
    def route(self) -> tuple[str, ...]:
        """The chain's shards from head to tail, as short text for people."""
        ...

    def timings(self) -> Timings:
        """Return where its time went so far."""
        ...

    def __aiter__(self) -> AsyncIterator[Delta]: ...

    async def aclose(self) -> None: ...


class Driver(Protocol):
    """A model that answers over a chain of shards."""

    @property
    def model_id(self) -> str: ...

    @property
    def created(self) -> int:
        """When the model was opened, in Unix seconds."""
        ...

    @property
    def context_tokens(self) -> int:
        """Most tokens that prompt and answer may have together."""
        ...

    @property
    def vocab_size(self) -> int:
        """Token ids are below it."""
        ...

    @property
    def embedding_size(self) -> int:
        """Dimensions of the vectors that `embed` returns."""
        ...

    async def chat(self, messages: Sequence[Message], params: GenerateParams) -> Completion:
        """Start the answers to a conversation, once a chain has accepted the first.

        Raises:
            ContextTooLong: The messages and the answer do not fit.
            TemplateError: The model's chat template refuses the messages.
            InvalidText: They are no text that the tokenizer takes.
            InvalidGrammar: What the answer may consist of cannot be enforced.
            NoChain: No reachable shards cover every layer.
            SessionRefused: A shard does not take the session.
            StepTimeout: A shard did not answer in time.
            ShardLost: A shard went away.
        """
        ...

    async def complete(self, prompt: Prompt, params: GenerateParams) -> Completion:
        """Start the answers that go on with a prompt, which has no template.

        Raises:
            PalsError: As `chat` does.
        """
        ...

    async def embed(self, inputs: Sequence[Prompt]) -> list[Embedding]:
        """Return what texts are to the model, in order.

        Raises:
            UnsupportedParameter: This driver cannot.
            PalsError: As `chat` does.
        """
        ...

    async def report(self) -> Sequence[HopReport]:
        """Return how the shards of the last used chain did lately, head first."""
        ...
