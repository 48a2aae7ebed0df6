"""One session as its driver sees it: what was asked, what was answered, and by which chain."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec
import numpy as np
import numpy.typing as npt
import trio

from pals.driver.recovery import StepClock
from pals.errors import InvalidGrammar, PalsError
from pals.net.control import (
    MAX_DEADLINE_S,
    MAX_HISTORY_TOKENS,
    GrammarSpec,
    Hop,
    Open,
    Sampler,
)
from pals.net.flow import AckPolicy
from pals.net.route import Chain
from pals.types import Grammar, LayerRange, PeerId, Sampling, SessionId


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionRequest:
    """One sequence to generate.

    Attributes:
        prompt: Token ids, at least one.
        max_new_tokens: Most tokens to sample; None takes what the context has left.
        stop_token_ids: Ids after which the tail stops.
        sampling: How the tail samples.
        deadline_s: Seconds within which somebody wants the answer; None for any time.
        grammar: What the answer may consist of; None for anything.
    """

    prompt: tuple[int, ...]
    max_new_tokens: int | None
    stop_token_ids: tuple[int, ...]
    sampling: Sampling
    deadline_s: float | None = None
    grammar: Grammar | None = None


@dataclass(frozen=True, slots=True)
class SampledToken:
    """A token of the answer.

    Attributes:
        token: Its id.
        last: The tail has stopped by itself, or the answer is as long as it may be.
        logprob: Of the token, where the request asks for it.
        top: Ids and log-probabilities of the likeliest tokens, as many as it asks for.
        pooled: ``float32[D]``, what came instead of a token where the request pools.
    """

    token: int
    last: bool
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    pooled: npt.NDArray[np.float32] | None = None


NOT_ASKED = -1

SessionEvent = SampledToken | PalsError
Sink = Callable[[SessionEvent], None]


@dataclass(slots=True, kw_only=True, eq=False)
class Attempt:
    """A session over one chain, for as long as all of its shards hold.

    Attributes:
        session: What the shards call it; each attempt has an id of its own.
        chain: The shards.
        owner: Whose tokens it makes.
        next_position: Where its next token stands; `NOT_ASKED` before it has the prompt.
        unanswered: Shards that have not said that they opened it.
        held: Tokens of the prompt that each of the others has already.
        start: Where its prompt began, before which every shard had it.
        answered: Set when all have, or when it failed.
        error: Why it is over.
        failed: The peers at fault.
        broken_link: A shard and the neighbour that it says it lost.
        leaving: Shards that are about to stop.
        acks: When the tail is told what was taken; None before it has the prompt.
        prompted_at: When it was given the prompt.
        early: Tokens that came before the driver knew that every shard holds; they wait for
            that. The tail is told of none, and stops soon.
    """

    chain: Chain
    owner: ClientSession
    session: SessionId = field(default_factory=lambda: SessionId(os.urandom(16)))
    next_position: int = NOT_ASKED
    unanswered: set[PeerId] = field(default_factory=set[PeerId])
    held: dict[PeerId, int] = field(default_factory=dict[PeerId, int])
    start: int = 0
    answered: trio.Event = field(default_factory=trio.Event)
    error: PalsError | None = None
    failed: set[PeerId] = field(default_factory=set[PeerId])
    broken_link: tuple[PeerId, PeerId] | None = None
    leaving: set[PeerId] = field(default_factory=set[PeerId])
    acks: AckPolicy | None = None
    prompted_at: float = 0.0
    early: list[SampledToken] = field(default_factory=list[SampledToken])

    def __post_init__(self) -> None:
        self.unanswered = set(self.peers)

    @property
    def peers(self) -> frozenset[PeerId]:
        return frozenset(hop.peer for hop in self.chain.hops)

    def layers_of(self, peer: PeerId) -> LayerRange:
        """Return what one of the shards serves."""
        return next(hop.layers for hop in self.chain.hops if hop.peer == peer)

    def note_opened(self, peer: PeerId, held: int) -> None:
        """Take that one shard has room, and the first tokens of the prompt already."""
        self.held[peer] = held
        self.unanswered.discard(peer)
        if not self.unanswered:
            self.answered.set()

    def check(self) -> None:
        """Raise the `PalsError` that it is over for, if it is."""
        if self.error is not None:
            raise self.error

    def fail(self, error: PalsError) -> None:
        """End it, for the first reason that comes."""
        self.error = self.error or error
        self.answered.set()
        self.owner.wake()


@dataclass(slots=True, kw_only=True, eq=False)
class ClientSession:
    """One session, over as many chains as it takes.

    Attributes:
        request: What was asked.
        sink: Told every token once, in order, and at most one error.
        max_new_tokens: Tokens that the answer may have; 0 until the first chain is known.
        tokens: The answer so far.
        held: Tokens of the old chain while a new one is asked to go on before them; None
            when tokens go straight to the sink.
        former: The attempt that was asked last: the next one takes its place in line.
        deadline: After which nobody wants the answer, on trio's clock.
        current: The attempt that makes its tokens.
        clock: The deadlines of that attempt.
        changed: Set when its supervisor has something to look at.
        scope: Of its supervisor.
        failures: Attempts that ended since the last token.
        preemptions: Attempts that lost their room to others since then.
        silent: Shards that did not answer when asked.
        silent_since: Since when.
        ended: Nothing more will come.
    """

    request: SessionRequest
    sink: Sink
    max_new_tokens: int = 0
    tokens: list[int] = field(default_factory=list[int])
    held: list[SampledToken] | None = None
    former: SessionId | None = None
    deadline: float = math.inf
    current: Attempt | None = None
    clock: StepClock | None = None
    changed: trio.Event = field(default_factory=trio.Event)
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    failures: int = 0
    preemptions: int = 0
    silent: frozenset[PeerId] = frozenset()
    silent_since: float | None = None
    ended: bool = False

    @property
    def attempt(self) -> Attempt:
        """The attempt of a session that is open."""
        assert self.current is not None
        return self.current

    @property
    def chain(self) -> Chain:
        return self.attempt.chain

    @property
    def context_tokens(self) -> int:
        """Positions that the whole session takes."""
        return len(self.request.prompt) + self.max_new_tokens

    def history(self) -> tuple[int, ...]:
        """Return prompt and answer, which is the prompt of whoever goes on."""
        return (*self.request.prompt, *self.tokens)

    def wake(self) -> None:
        """Let the supervisor look."""
        self.changed.set()

    def take_token(self, token: SampledToken, now: float) -> None:
        """Take the next token, and give it to the sink unless it has to be held."""
        if self.held is not None and not token.last:
            self.held.append(token)
            return
        self.release_held(now)
        self._deliver(token, now)

    def release_held(self, now: float) -> None:
        """Give the tokens of the old chain to the sink after all."""
        held, self.held = self.held, None
        for token in held or ():
            self._deliver(token, now)

    def _deliver(self, token: SampledToken, now: float) -> None:
        assert self.clock is not None
        self.clock.note_token(now)
        self.tokens.append(token.token)
        self.failures = self.preemptions = 0
        self.silent, self.silent_since = frozenset(), None
        self.ended = self.ended or token.last
        self.sink(token)

    def build_open(self, attempt: Attempt, names: bytes, now: float) -> Open:
        """Return what the shards of an attempt are asked to go on with.

        Args:
            attempt: Over whose chain.
            names: Of the blocks of prompt and answer.
            now: On trio's clock.
        """
        hops = tuple(
            Hop(peer=h.peer, start=h.layers.start, stop=h.layers.stop, addresses=h.addresses)
            for h in attempt.chain.hops
        )
        return Open(
            session=attempt.session,
            chain=hops,
            prompt_tokens=len(self.request.prompt) + len(self.tokens),
            max_new_tokens=self.max_new_tokens - len(self.tokens),
            stop_token_ids=self.request.stop_token_ids,
            names=names,
            replaces=self.former or b"",
            deadline_s=0.0
            if math.isinf(self.deadline)
            else min(self.deadline - now, MAX_DEADLINE_S),
        )

    def build_sampler(self) -> Sampler:
        """Return what the tail is told of how to sample.

        Where penalties count tokens it learns which ones: those of the prompt once each and
        in no order, since that is all that they look at. A grammar goes on behind the answer.

        Raises:
            InvalidGrammar: The answer is longer than a tail can be told, for the grammar to go
                on behind it.
        """
        sampling, grammar = self.request.sampling, self.request.grammar
        sampler = Sampler.of(sampling)
        is_penalised = sampling.repetition_penalty != 1.0 or any(
            (sampling.presence_penalty, sampling.frequency_penalty)
        )
        if not (is_penalised or grammar):
            return sampler
        if grammar and len(self.tokens) > MAX_HISTORY_TOKENS:
            problem = f"an answer of {len(self.tokens)} tokens cannot go on elsewhere"
            raise InvalidGrammar(problem=f"the grammar cannot be enforced: {problem}")
        prompt = sorted(set(self.request.prompt)) if is_penalised else []
        told = [*prompt, *self.tokens][-MAX_HISTORY_TOKENS:]
        return msgspec.structs.replace(
            sampler,
            grammar=GrammarSpec.of(grammar) if grammar else None,
            history=np.array(told, "<u4").tobytes(),
            answered=min(len(self.tokens), len(told)),
        )
