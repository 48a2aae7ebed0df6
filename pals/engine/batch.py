"""What goes into the batcher and what comes out: sessions, rows, steps and events.

Pure: no clock, no arrays; times are seconds on a monotonic clock of the caller.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import Literal

from pals.engine.buckets import Program
from pals.engine.pages import PageCopy
from pals.errors import PalsError
from pals.types import PeerId, SessionId

RowKind = Literal["prefill", "decode", "verify"]
"""Tokens of a prompt, which may be cut into chunks; one token; a few that were drafted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchRules:
    """How much waits, and who gives way.

    Attributes:
        max_sessions: Sessions that run at one time.
        max_sessions_per_peer: Of one peer, those that wait to be admitted included.
        max_waiting_sessions: Sessions that wait to be admitted.
        max_waiting_tokens: Tokens of rows that wait for a step.
        prefill_share: Of the time, for a long prompt, or each short one, while others decode.
        kv_share: Of the pages, what a peer keeps when others want more.
        admission_wait_s: How long a session waits for room before it is refused.
        decoding_s: So long after its last row a session counts as one that goes on; then it
            pauses, and nobody waits for it.
    """

    max_sessions: int = 256
    max_sessions_per_peer: int = 256
    max_waiting_sessions: int = 256
    max_waiting_tokens: int = 1 << 20
    prefill_share: float = 0.25
    kv_share: float = 0.25
    admission_wait_s: float = 10.0
    decoding_s: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionRequest:
    """A session that a driver wants this shard to hold.

    Attributes:
        session: New; each attempt of a driver has an id of its own.
        peer: The driver.
        prompt_tokens: Tokens that are there from the beginning, replayed ones included.
        max_tokens: Positions that the whole session may take.
        names: Of the prompt's blocks, see `pals.engine.prefix`; may be empty.
        replaces: The session of the same driver that was preempted, moved or failed, and
            goes on in this one: it keeps its place in line.
        deadline: After which nobody wants the answer any more.
    """

    session: SessionId
    peer: PeerId
    prompt_tokens: int
    max_tokens: int
    names: tuple[bytes, ...] = ()
    replaces: SessionId | None = None
    deadline: float = float("inf")


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRow:
    """One session's part of a step.

    Attributes:
        session: Its id.
        kind: A row of kind ``prefill`` is the step's chunk.
        position: Of its first token.
        tokens: How many of its tokens run; a prompt's other ones come in later steps.
        pages: The session's page table, int32, as many as hold its tokens and these.
    """

    session: SessionId
    kind: RowKind
    position: int
    tokens: int
    pages: array[int]

    @property
    def end(self) -> int:
        """Where the next token will stand."""
        return self.position + self.tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One call of a compiled program.

    Attributes:
        program: Its padded sizes.
        rows: Short rows in the order of the batch, at most ``program.rows``.
        chunk: Of a prompt, where the program has one.
        copies: To do before any row writes.
    """

    program: Program
    rows: tuple[StepRow, ...]
    chunk: StepRow | None
    copies: tuple[PageCopy, ...]

    @property
    def all_rows(self) -> tuple[StepRow, ...]:
        """The chunk last."""
        return self.rows if self.chunk is None else (*self.rows, self.chunk)


@dataclass(frozen=True, slots=True)
class Admitted:
    """A session has room for its prompt, and the shard holds its first ``held`` tokens.

    They stay held. The driver goes on at the least of what the shards of the chain hold:
    the session's first row says where.
    """

    session: SessionId
    held: int


@dataclass(frozen=True, slots=True)
class Refused:
    """A session that waited is not taken; it holds nothing."""

    session: SessionId
    error: PalsError


@dataclass(frozen=True, slots=True)
class Preempted:
    """A session's pages went to others; the driver closes it everywhere and replays it."""

    session: SessionId


@dataclass(frozen=True, slots=True)
class Ended:
    """A running session was ended here; it holds nothing any more."""

    session: SessionId
    error: PalsError


Event = Admitted | Refused | Preempted | Ended
