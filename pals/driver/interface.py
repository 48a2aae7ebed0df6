"""What the HTTP API asks of a driver: one conversation in, a stream of text out.

The API side of these calls is asyncio; a driver that lives on trio bridges them.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

FinishReason = Literal["stop", "length"]
"""Why a completion ended: a stop token or stop string, or the token limit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One turn of a conversation, its content as plain text."""

    role: str
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateParams:
    """How one completion is made.

    Attributes:
        max_tokens: Most tokens to generate; None means what the context has left.
        temperature: 0 is greedy. Range 0 to 2.
        top_p: Smallest probability mass to sample from, in (0, 1].
        seed: Start of the random stream; None lets the driver draw one.
        stop: Up to 4 strings; the text ends before the first of them.
    """

    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class TextDelta:
    """A piece of the answer; only the last one carries a finish reason."""

    text: str
    finish_reason: FinishReason | None = None


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
    """One running completion.

    Iterate once; each step may run in another task of the same loop, and cancelling a
    step ends the iteration. It raises `PalsError` when the session fails on the way.
    `aclose` frees the session on every shard; it may be called at any time and twice.
    """

    @property
    def prompt_tokens(self) -> int: ...

    @property
    def completion_tokens(self) -> int:
        """Tokens generated so far."""
        ...

    @property
    def route(self) -> tuple[str, ...]:
        """The chain's shards from head to tail, as short text for people."""
        ...

    def __aiter__(self) -> AsyncIterator[TextDelta]: ...

    async def aclose(self) -> None: ...


class Driver(Protocol):
    """A model that answers conversations over a chain of shards."""

    @property
    def model_id(self) -> str: ...

    @property
    def created(self) -> int:
        """When the model was opened, in Unix seconds."""
        ...

    async def chat(self, messages: Sequence[Message], params: GenerateParams) -> Completion:
        """Start a completion; it returns once a chain has accepted the session.

        Raises:
            ContextTooLong: The messages and the answer do not fit.
            TemplateError: The model's chat template refuses the messages.
            NoChain: No reachable shards cover every layer.
            SessionRefused: A shard does not take the session.
            StepTimeout: A shard did not answer in time.
            ShardLost: A shard went away.
        """
        ...

    async def report(self) -> Sequence[HopReport]:
        """Return how the shards of the last used chain did lately, head first."""
        ...
