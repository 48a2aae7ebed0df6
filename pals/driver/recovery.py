"""When a session's silence means something, and which chains are worth another try.

Pure: the time is an argument, in seconds of a monotonic clock.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from pals.errors import (
    CapacityError,
    NoChain,
    PalsError,
    PeerUnreachable,
    ShardDraining,
    ShardLost,
    StepTimeout,
)
from pals.net.route import Chain
from pals.types import LayerRange, PeerId

STEP_MULTIPLE = 4.0
"""Of the expected time of a step: after that long without a token the shards are asked."""

MIN_STEP_DEADLINE_S = 1.0
MIN_PREFILL_DEADLINE_S = 2.0
CHUNK_TOKENS = 256
PREFILL_TOKENS_PER_LIMIT = 512
STUCK_MULTIPLE = 20.0
SMOOTHING = 0.125
PACES = 8
PACE_TOKENS = 16
"""A shorter prompt, or the rest of one that was held, takes as long as so many tokens."""
MAX_TRIES = 64
MAX_FAILURES = 8
"""Chains that may fail a session one after another without a token between."""

MAX_PREEMPTIONS = 16
"""Times that a session may lose its room to others without a token between, before it asks
elsewhere."""

NEW_REQUEST_WAIT_S = 5.0

Offer = tuple[PeerId, LayerRange]
"""What one peer serves; a peer that came back with other layers makes another offer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long a driver waits.

    Attributes:
        step_deadline_s: Longest wait for one token although every shard answers; the first
            may take as long for each `PREFILL_TOKENS_PER_LIMIT` tokens of the prompt.
        wait_for_peers_s: How long a session whose layers nobody serves waits for a peer
            that does. A request that has not begun waits `NEW_REQUEST_WAIT_S` at most.
        wait_for_room_s: How long a session waits whose room went to others.
    """

    step_deadline_s: float = 30.0
    wait_for_peers_s: float = 30.0
    wait_for_room_s: float = 300.0

    @property
    def new_request_s(self) -> float:
        """How long a request waits for its first chain."""
        return min(self.wait_for_peers_s, NEW_REQUEST_WAIT_S)


@dataclass(slots=True)
class PrefillPace:
    """Seconds that a token of a prompt takes, by the slowest of the last prompts."""

    _samples: deque[float] = field(default_factory=lambda: deque[float](maxlen=PACES))

    def note(self, tokens: int, seconds: float) -> None:
        """Take the time from a prompt's sending to its first token."""
        self._samples.append(seconds / max(tokens, PACE_TOKENS))

    @property
    def s_per_token(self) -> float:
        """The pace; 0 before the first prompt."""
        return max(self._samples, default=0.0)


@dataclass(slots=True, kw_only=True)
class StepClock:
    """The deadlines of one session over one chain.

    Silence first makes the driver ask the shards whether they are there, which costs a
    healthy chain nothing; only much later is a chain given up whose shards all answer.

    Attributes:
        limit_s: See `Patience.step_deadline_s`.
        pace: Of this driver's prompts.
        step_s: Expected time of one token: announced at first, then measured.
        prompt_tokens: Tokens that the chain computes before its first one.
        last: When the last token came, or the prompt was sent.
        asked: When the shards last answered.
        has_token: Whether the prompt is done.
    """

    limit_s: float
    pace: PrefillPace
    step_s: float
    prompt_tokens: int
    last: float
    asked: float
    has_token: bool = False

    @classmethod
    def start(
        cls,
        *,
        limit_s: float,
        pace: PrefillPace,
        step_ms: float,
        prompt_tokens: int,
        sent: float,
        now: float,
    ) -> StepClock:
        """Return the clock of a prompt that was ``sent`` and whose shards have all answered."""
        return cls(
            limit_s=limit_s,
            pace=pace,
            step_s=step_ms / 1000,
            prompt_tokens=prompt_tokens,
            last=sent,
            asked=now,
        )

    def note_token(self, now: float) -> None:
        """Take the arrival of a token."""
        took_s, self.last = now - self.last, now
        if not self.has_token:
            self.has_token = True
            self.pace.note(self.prompt_tokens, took_s)
        else:
            self.step_s += SMOOTHING * (took_s - self.step_s)

    def note_answers(self, now: float) -> None:
        """Take that every shard has said that it is there."""
        self.asked = now

    @property
    def suspicious_at(self) -> float:
        """When to ask the shards whether they are there."""
        if self.has_token:
            deadline_s = max(MIN_STEP_DEADLINE_S, STEP_MULTIPLE * self.step_s)
        else:
            chunk_s = self.pace.s_per_token * min(self.prompt_tokens, CHUNK_TOKENS)
            deadline_s = max(MIN_PREFILL_DEADLINE_S, STEP_MULTIPLE * chunk_s)
        return max(self.last, self.asked) + deadline_s

    @property
    def stuck_at(self) -> float:
        """When to give the chain up although its shards answer."""
        return self.last + self.deadline_s

    @property
    def deadline_s(self) -> float:
        """Longest wait for the next token, in seconds."""
        if self.has_token:
            return max(self.limit_s, STUCK_MULTIPLE * self.step_s)
        factor = 1 + self.prompt_tokens // PREFILL_TOKENS_PER_LIMIT
        expected_s = STEP_MULTIPLE * self.pace.s_per_token * self.prompt_tokens
        return max(self.limit_s * factor, expected_s)


@dataclass(slots=True)
class Round:
    """One pass over the chains that could serve a session.

    Attributes:
        avoided: Offers that failed in this round; the next one may take them again.
        failed: The peers at fault so far.
        failure: Why the last chain failed, or that one is full: that passes sooner.
    """

    avoided: set[Offer] = field(default_factory=set[Offer])
    failed: set[PeerId] = field(default_factory=set[PeerId])
    failure: PalsError | None = None
    _tried: set[tuple[Offer, ...]] = field(default_factory=set[tuple[Offer, ...]])

    def note(self, chain: Chain, failed: frozenset[PeerId], error: PalsError) -> None:
        """Take the failure of a chain.

        Args:
            chain: Which failed.
            failed: The peers at fault; when there are none the chain alone is not tried again.
            error: Why.
        """
        self._tried.add(offers_of(chain))
        self.failed |= failed
        self.avoided |= {offer for offer in offers_of(chain) if offer[0] in failed}
        if not isinstance(self.failure, CapacityError):
            self.failure = error

    def is_new(self, chain: Chain) -> bool:
        """Return whether to try ``chain``; a round that has nothing new is over."""
        return offers_of(chain) not in self._tried and len(self._tried) < MAX_TRIES

    def explain(self, no_chain: NoChain | None) -> PalsError:
        """Return why the round is over without a chain.

        Peers that are simply gone are told as the layers that are missing.
        """
        is_gone = isinstance(
            self.failure, PeerUnreachable | ShardLost | StepTimeout | ShardDraining | None
        )
        if no_chain is not None and is_gone:
            return no_chain
        assert self.failure is not None
        return self.failure


def offers_of(chain: Chain) -> tuple[Offer, ...]:
    """Return what the hops of a chain offered, head first."""
    return tuple((hop.peer, hop.layers) for hop in chain.hops)
