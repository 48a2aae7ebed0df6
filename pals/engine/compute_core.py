"""What waits for the steps of one shard: the rows' inputs beside the batcher's view of them.

Pure: no clock, no thread, no jax; `now` is seconds on a monotonic clock of the caller.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pals.engine.batch import Admitted, Refused, SessionRequest, Step, StepRow
from pals.engine.batcher import Batcher
from pals.engine.work import (
    AllowedTokens,
    Array,
    InputRow,
    OwnedEvent,
    PenaltyHistory,
    RefusedRow,
    RowResult,
    RowSampling,
    StepOutput,
)
from pals.errors import InvalidStep, PalsError, QueueFull
from pals.types import Sampling, SessionId


@dataclass(slots=True, kw_only=True, eq=False)
class Member:
    """One session, from its opening until it is over; equal only to itself.

    Attributes:
        session: Its id.
        owner: As given at `Compute.open`.
        prompt_tokens: A chunk that ends there, or beyond, samples.
        sampling: At the tail.
        history: Until the session has been admitted.
        row_sampling: Once the sampler has made room for it.
        inputs: That wait, in the order in which they run.
        taken: Tokens of the first of them that have run.
        pooled: The sum of the prompt's last hidden states so far, where that is asked for.
        allowed: What the next token may be, until the step that samples it.
    """

    session: SessionId
    owner: Hashable
    prompt_tokens: int
    sampling: Sampling | None
    history: PenaltyHistory | None
    row_sampling: RowSampling | None = None
    inputs: deque[InputRow] = field(default_factory=deque[InputRow])
    taken: int = 0
    pooled: npt.NDArray[np.float32] | None = None
    allowed: AllowedTokens | None = None

    @property
    def pools(self) -> bool:
        """Whether the prompt is pooled instead of answered."""
        return self.sampling is not None and self.sampling.pooling


class SamplingChanges(NamedTuple):
    """Who needs room in the sampler's bank, and what of it nobody needs any more."""

    closed: list[RowSampling]
    opened: list[Member]


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """A step with all that it needs.

    Attributes:
        step: As the batcher planned it.
        inputs: Of each of its rows.
        samplings: Of each of its rows; None for those that do not sample.
        masks: What those may sample whose rows say so, to be set before the step runs.
        rows: What will be said of them when the step has run.
    """

    step: Step
    inputs: list[Array]
    samplings: list[RowSampling | None]
    masks: list[tuple[RowSampling, AllowedTokens]]
    rows: tuple[RowResult, ...]


class Compute:
    """The sessions of a shard with their waiting inputs, around its batcher.

    Call in turns: `take_changes` until there are none, `plan`, and after the step `finish`
    or `fail`. The other methods may come at any time between.

    Args:
        batcher: Nobody else uses it.
        is_tail: Rows sample here.
        max_queued_bytes: Most bytes of inputs that wait at one time. What of an array has
            run counts until all of it has.
    """

    def __init__(self, batcher: Batcher, *, is_tail: bool, max_queued_bytes: int) -> None:
        self.batcher = batcher
        self._is_tail = is_tail
        self._max_bytes = max_queued_bytes
        self._members: dict[SessionId, Member] = {}
        self._newcomers: list[Member] = []
        self._closed: list[RowSampling] = []
        self._refused: list[OwnedEvent] = []
        self._bytes = 0

    @property
    def queued_bytes(self) -> int:
        """Bytes of all inputs that wait."""
        return self._bytes

    # --- sessions --------------------------------------------------------------------

    def open(
        self,
        request: SessionRequest,
        owner: Hashable,
        sampling: Sampling | None,
        history: PenaltyHistory | None,
        now: float,
    ) -> None:
        """Let a session wait for room; raises as `Batcher.open` does."""
        self.batcher.open(request, now)
        self._enter(
            Member(
                session=request.session,
                owner=owner,
                prompt_tokens=request.prompt_tokens,
                sampling=sampling,
                history=history,
            )
        )

    def fork(
        self,
        parent: SessionId,
        child: SessionId,
        position: int,
        owner: Hashable,
        sampling: Sampling | None,
        history: PenaltyHistory | None,
        now: float,
    ) -> None:
        """Begin a session with the first tokens of another; raises as `Batcher.fork` does."""
        self.batcher.fork(parent, child, position, now)
        self._enter(
            Member(
                session=child,
                owner=owner,
                prompt_tokens=self._members[parent].prompt_tokens,
                sampling=sampling,
                history=history,
            )
        )

    def close_session(self, session: SessionId, names: tuple[bytes, ...] = ()) -> None:
        """End a session, if it is not over already; no event says so."""
        self.batcher.close(session, names)
        self._leave(session)

    def _enter(self, member: Member) -> None:
        assert (member.sampling is not None) == self._is_tail
        self._members[member.session] = member
        if self._is_tail:
            self._newcomers.append(member)

    def _leave(self, session: SessionId) -> None:
        """Drop what waits for a session that is over; the step that runs has what it needs."""
        if (member := self._members.pop(session, None)) is None:
            return
        self._bytes -= sum(row.inputs.nbytes for row in member.inputs)
        member.inputs.clear()
        self._close_sampling(member)

    # --- sampling --------------------------------------------------------------------

    def take_changes(self) -> SamplingChanges | None:
        """Return what the sampler has to do before the next plan; None for nothing."""
        if not self._newcomers and not self._closed:
            return None
        opened = [m for m in self._newcomers if self._members.get(m.session) is m]
        changes = SamplingChanges(self._closed, opened)
        self._newcomers, self._closed = [], []
        return changes

    def set_sampling(self, member: Member, row_sampling: RowSampling) -> None:
        """Take the room that the sampler made for a session, which may be over by now."""
        member.row_sampling = row_sampling
        if self._members.get(member.session) is not member:
            self._close_sampling(member)

    def refuse(self, member: Member, error: PalsError) -> None:
        """End a session that the sampler has no room for; the next plan's events say so."""
        if self._members.get(member.session) is member:
            self.close_session(member.session)
            self._refused.append(OwnedEvent(member.owner, Refused(member.session, error)))

    def _close_sampling(self, member: Member) -> None:
        if member.row_sampling is not None:
            self._closed.append(member.row_sampling)
            member.row_sampling = None

    # --- rows ------------------------------------------------------------------------

    def add(self, rows: Sequence[InputRow], now: float) -> list[RefusedRow]:
        """Queue rows, each behind the others of its session.

        Returns:
            Those that were not queued, and why; see `ComputeThread.add`.
        """
        refused: list[RefusedRow] = []
        for row in rows:
            try:
                self._add(row, now)
            except PalsError as error:
                refused.append(RefusedRow(row, error))
        return refused

    def _add(self, row: InputRow, now: float) -> None:
        member = self._members.get(row.session)
        if member is None or member.owner is not row.owner:
            return  # it is late
        if self._bytes + row.inputs.nbytes > self._max_bytes:
            raise QueueFull(queue="step", limit=f"{self._max_bytes} bytes")
        if not self.batcher.add(row.session, row.kind, row.position, len(row.inputs), now):
            raise InvalidStep(problem="a row of a session that is not admitted yet")
        member.inputs.append(row)
        self._bytes += row.inputs.nbytes

    # --- steps -----------------------------------------------------------------------

    def plan(self, now: float) -> tuple[Planned | None, tuple[OwnedEvent, ...]]:
        """Return the next step, and what has happened; None when nothing can run now.

        The step has to run: its rows wait no longer, and its pages are set.
        """
        step = self.batcher.plan(now)
        events = self._take_events()
        return (None if step is None else self._assemble(step)), events

    def finish(self, planned: Planned, seconds: float) -> None:
        """Take that a step has run, and how long it took."""
        self.batcher.finish(planned.step, seconds)

    def pool(self, planned: Planned, output: StepOutput) -> StepOutput:
        """Return the output of a step with the sum of all chunks of its prompt so far."""
        if output.pooled is None:
            return output
        row = planned.rows[-1]
        member = self._members.get(row.session)
        if member is None or member.owner is not row.owner:
            return output  # it is over
        before = 0.0 if member.pooled is None else member.pooled
        member.pooled = before + output.pooled
        return output._replace(pooled=member.pooled)

    def fail(self, error: PalsError) -> tuple[OwnedEvent, ...]:
        """End every session that runs: a step failed, and took cache and bank along.

        The sampler forgets all that it has made room for. Sessions that wait to be admitted go
        on, and need new room.
        """
        self.batcher.fail(error)
        events = self._take_events()
        self._closed.clear()
        for member in self._members.values():
            if member.row_sampling is not None:
                member.row_sampling = None
                self._newcomers.append(member)
        return events

    def _take_events(self) -> tuple[OwnedEvent, ...]:
        """Return what has happened, and drop the sessions that are over."""
        owned, self._refused = self._refused, []
        for event in self.batcher.take_events():
            member = self._members[event.session]
            owned.append(OwnedEvent(member.owner, event))
            if isinstance(event, Admitted):
                member.history = None
            else:
                self._leave(event.session)
        return tuple(owned)

    def _assemble(self, step: Step) -> Planned:
        inputs: list[Array] = []
        samplings: list[RowSampling | None] = []
        masks: list[tuple[RowSampling, AllowedTokens]] = []
        rows: list[RowResult] = []
        first = 0
        for row in step.all_rows:
            member = self._members[row.session]
            came = member.inputs[0]
            samples = self._is_tail and _samples(row, member)
            outputs = _count_outputs(row, is_tail=self._is_tail, samples=samples)
            inputs.append(self._cut(member, row))
            sampling = member.row_sampling if samples else None
            samplings.append(sampling)
            if sampling is not None and member.allowed is not None:
                masks.append((sampling, member.allowed))
                member.allowed = None
            rows.append(
                RowResult(
                    owner=member.owner,
                    session=row.session,
                    kind=row.kind,
                    position=row.position,
                    tokens=row.tokens,
                    first=first,
                    outputs=outputs,
                    arrived_s=came.arrived_s,
                    codec_s=came.codec_s,
                )
            )
            first += outputs
        return Planned(step=step, inputs=inputs, samplings=samplings, masks=masks, rows=tuple(rows))

    def _cut(self, member: Member, row: StepRow) -> Array:
        """Take the inputs of a row that runs off the front of what waits for its session."""
        first = member.inputs[0]
        assert first.position + member.taken == row.position
        if not member.taken and len(first.inputs) == row.tokens:  # as with every short row
            return self._pop(member)
        parts: list[Array] = []
        lacking = row.tokens
        while lacking:
            waiting, start = member.inputs[0].inputs, member.taken
            part = waiting[start : start + lacking]
            lacking -= len(part)
            member.taken += len(part)
            if member.taken == len(waiting):
                self._pop(member)
            parts.append(part)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _pop(self, member: Member) -> Array:
        row = member.inputs.popleft()
        member.taken = 0
        member.allowed = row.allowed if row.allowed is not None else member.allowed
        self._bytes -= row.inputs.nbytes
        return row.inputs


def _samples(row: StepRow, member: Member) -> bool:
    """Return whether a row makes something at the tail; chunks within a prompt do not."""
    return row.kind != "prefill" or row.end >= member.prompt_tokens or member.pools


def _count_outputs(row: StepRow, *, is_tail: bool, samples: bool) -> int:
    if not is_tail or row.kind != "prefill":
        return row.tokens
    return 1 if samples else 0
