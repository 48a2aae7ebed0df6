"""What the compute thread takes, what it gives back, and what it needs of a shard.

Plain values without jax, so that whoever talks to the thread need not import it. All times
are seconds of the one clock that the thread was given, `time.perf_counter` unless a test
has another.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from pals.engine.batch import Event, RowKind, Step
from pals.engine.sampling_rows import RowSampling
from pals.errors import PalsError
from pals.types import LayerRange, Sampling, SessionId

Array = npt.NDArray[np.generic]
AllowedTokens = npt.NDArray[np.uint32]
"""``uint32[W]``, W = V/32 rounded up: a bit for each token that may be sampled, the lowest first,
and one at least."""


class PenaltyHistory(NamedTuple):
    """What the sampler's bank begins with for a session.

    Attributes:
        tokens: ``int32[n]``, the ids of prompt and answer so far that penalties look at.
        answered: How many of them, at the end, are of the answer.
        is_masked: Whether rows will come with the tokens that may be sampled.
    """

    tokens: npt.NDArray[np.int32]
    answered: int
    is_masked: bool = False


class Sampled(NamedTuple):
    """The tokens of a step at the tail, on the host.

    There is one for each token of each short row, row after row, and then one for the chunk
    if it ends its prompt.

    Attributes:
        ids: ``int32[n]``.
        logprobs: ``float32[n]``, natural logarithms; 0 where the row did not ask.
        top_ids: ``int32[n, 20]``, the likeliest first; -1 past as many as the row asked for.
        top_logprobs: ``float32[n, 20]``; 0 past these.
    """

    ids: npt.NDArray[np.int32]
    logprobs: npt.NDArray[np.float32]
    top_ids: npt.NDArray[np.int32]
    top_logprobs: npt.NDArray[np.float32]


class StepOutput(NamedTuple):
    """What a step makes.

    Attributes:
        hidden: ``[t, D]`` of all real tokens, in the order of `Step.all_rows`; None at the tail.
        sampled: At the tail.
        pooled: At the tail, ``float32[D]``: the sum of the hidden states after the final norm
            of a prompt whose session pools, up to the end of the chunk.
    """

    hidden: Array | None
    sampled: Sampled | None
    pooled: npt.NDArray[np.float32] | None = None


class StepRunner(Protocol):
    """What the compute thread needs of `pals.engine.shard.Shard`.

    All but `check_inputs` are called on the compute thread, one at a time.
    """

    @property
    def layers(self) -> LayerRange: ...

    @property
    def is_tail(self) -> bool: ...

    def check_inputs(self, inputs: Array) -> None:
        """Raise unless rows of ``inputs`` can be computed; called on any thread.

        Raises:
            InvalidStep: Their shape or dtype is another, or a token id is out of range.
        """
        ...

    def open_sampling(self, sampling: Sampling, history: PenaltyHistory | None) -> RowSampling:
        """Make room for a session's penalties, bias and mask in the bank, if it has any.

        Raises:
            CapacityError: The bank is full.
        """
        ...

    def close_sampling(self, row_sampling: RowSampling) -> None:
        """Give that room to others; the step that used it has run."""
        ...

    def set_allowed(self, row_sampling: RowSampling, allowed: AllowedTokens) -> None:
        """Let a session that has room in the bank sample only some tokens from now on.

        Args:
            row_sampling: Of a session that was opened as masked.
            allowed: See `InputRow`.
        """
        ...

    def run(
        self,
        step: Step,
        inputs: Sequence[Array],
        samplings: Sequence[RowSampling | None],
    ) -> StepOutput:
        """Run a step that was planned.

        Args:
            step: All its programs are compiled.
            inputs: Of each of `Step.all_rows`: ``int32[t]`` at the head, else ``[t, D]``.
            samplings: Of each of them that samples; None for the others.
        """
        ...

    def reset(self) -> None:
        """Begin with an empty cache and bank: a step that failed took them along.

        No session has room in the bank any more; `close_sampling` is called for none of them.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class InputRow:
    """Tokens of one session that came in one frame.

    Attributes:
        owner: Of the session, as given at `open`: an id may come again.
        session: Its id.
        kind: A prompt's, one token, or a few to verify.
        position: Of the first token.
        inputs: ``int32[t]`` token ids at the head, else ``[t, D]`` hidden states.
        arrived_s: When its frame came.
        codec_s: What opening the frame took.
        allowed: At the tail, what may be sampled after its last token and until a later row
            says something else; None for what was allowed before.
    """

    owner: Hashable
    session: SessionId
    kind: RowKind
    position: int
    inputs: Array
    arrived_s: float = 0.0
    codec_s: float = 0.0
    allowed: AllowedTokens | None = None


class RefusedRow(NamedTuple):
    """A row that was not queued; its session cannot go on."""

    row: InputRow
    error: PalsError


@dataclass(slots=True, kw_only=True)
class RowResult:
    """One row of a step that has run.

    Attributes:
        owner: Of the session when the step was planned; it may be over by now.
        session: Its id.
        kind: A row of kind ``prefill`` is a chunk, which may be a part of what came.
        position: Of its first token.
        tokens: How many ran.
        first: Where its outputs begin: in `StepOutput.hidden`, or at the tail in `Sampled`.
        outputs: How many it has: ``tokens``; at the tail 1 for each token of a short row and
            for the chunk that ends a prompt, or is of one that is pooled, and 0 for every
            other chunk.
        arrived_s: When the frame of its first token came.
        codec_s: What opening that took.
    """

    owner: Hashable
    session: SessionId
    kind: RowKind
    position: int
    tokens: int
    first: int
    outputs: int
    arrived_s: float
    codec_s: float

    @property
    def end(self) -> int:
        """Where the next token will stand."""
        return self.position + self.tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """A step that has run, or failed.

    Attributes:
        rows: In the order of the step, the chunk last.
        output: None when it failed.
        free_s: When the thread had nothing to do before it.
        started_s: When the step began.
        finished_s: When its outputs were on the host.
        error: Why it failed. Every session that ran has ended then; events say so.
    """

    rows: tuple[RowResult, ...]
    output: StepOutput | None
    free_s: float
    started_s: float
    finished_s: float
    error: Exception | None = None


class OwnedEvent(NamedTuple):
    """What happened to a session, and whose it was then."""

    owner: Hashable
    event: Event


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """What the thread has to tell, in order: first the events, then the step.

    Both may be of sessions that were closed meanwhile; whoever takes it compares owners.
    """

    events: tuple[OwnedEvent, ...]
    result: StepResult | None
