"""What a shard's service stands between: links that note what is sent, and no engine."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
import trio

from pals.engine.batch import SessionRequest
from pals.engine.work import (
    InputRow,
    PenaltyHistory,
    RefusedRow,
    RowResult,
    Sampled,
    StepOutput,
    StepResult,
)
from pals.errors import PalsError, PeerUnreachable
from pals.net.control import Control, decode_control
from pals.net.wire import Kind, Lane, Outgoing, Row
from pals.types import PeerId, Sampling, SessionId

DRIVER, LOCAL, NEXT = PeerId("driver"), PeerId("local"), PeerId("next")
FREE_TOKENS = 4096


class FakeLinks:
    """Notes what is sent."""

    def __init__(self) -> None:
        self.sent: list[tuple[PeerId, Outgoing]] = []
        self.decode_seal_s: list[float] = []

        self.unreachable = trio.Event()
        self.silent: set[PeerId] = set()
        self.members = {DRIVER, LOCAL, NEXT}

    def is_member(self, peer: PeerId) -> bool:
        return peer in self.members

    async def ensure(self, peer: PeerId, addresses: Sequence[str]) -> None:
        await trio.lowlevel.checkpoint()
        if peer in self.silent:
            await self.unreachable.wait()
            raise PeerUnreachable(peer=peer, problem="silent")

    def send(self, peer: PeerId, lane: Lane, outgoing: Outgoing) -> None:
        self.sent.append((peer, outgoing))

    def control(self) -> list[Control]:
        return [
            decode_control(peer, memoryview(b"".join(outgoing.payload)))
            for peer, outgoing in self.sent
            if outgoing.shape.kind is Kind.CONTROL
        ]

    def rows(self) -> list[tuple[PeerId, Row]]:
        return [(peer, row) for peer, outgoing in self.sent for row in outgoing.rows]


class FakeCompute:
    """Keeps sessions and rows until the test says what became of them.

    Attributes:
        owners: Of the sessions that are open here.
        requests: What was asked for them.
        samplings: How they sample, and what their penalties look at.
        items: The rows that wait.
        closed: The sessions that were closed, with the names of their blocks.
        refusal: Why no session is taken.
        refused_rows: Why no row is queued.
    """

    free_tokens = FREE_TOKENS

    def __init__(self) -> None:
        self.owners: dict[SessionId, Hashable] = {}
        self.requests: dict[SessionId, SessionRequest] = {}
        self.samplings: dict[SessionId, tuple[Sampling | None, PenaltyHistory | None]] = {}
        self.items: list[InputRow] = []
        self.closed: list[tuple[SessionId, tuple[bytes, ...]]] = []
        self.forks: list[tuple[SessionId, SessionId, int]] = []
        self.refusal: PalsError | None = None
        self.refused_rows: PalsError | None = None

    def open(
        self,
        request: SessionRequest,
        owner: Hashable,
        sampling: Sampling | None = None,
        history: PenaltyHistory | None = None,
    ) -> None:
        if self.refusal is not None:
            raise self.refusal
        self.owners[request.session] = owner
        self.requests[request.session] = request
        self.samplings[request.session] = sampling, history

    def fork(
        self,
        parent: SessionId,
        child: SessionId,
        position: int,
        owner: Hashable,
        sampling: Sampling | None = None,
        history: PenaltyHistory | None = None,
    ) -> None:
        if self.refusal is not None:
            raise self.refusal
        self.forks.append((parent, child, position))
        self.owners[child] = owner
        self.samplings[child] = sampling, history

    def close_session(self, session: SessionId, names: tuple[bytes, ...] = ()) -> None:
        if self.owners.pop(session, None) is not None:
            self.closed.append((session, names))
        self.items = [item for item in self.items if item.session != session]

    def add(self, rows: Sequence[InputRow]) -> list[RefusedRow]:
        if self.refused_rows is not None:
            return [RefusedRow(row, self.refused_rows) for row in rows]
        self.items += [row for row in rows if self.owners.get(row.session) is row.owner]
        return []


def make_sampled(ids: Sequence[int]) -> Sampled:
    """Return tokens whose log-probability is minus their id, with two alternatives each."""
    array = np.array(ids, np.int32)
    top_ids = np.full((len(array), 20), -1, np.int32)
    top_ids[:, 0], top_ids[:, 1] = array, array + 1
    top_logprobs = np.zeros((len(array), 20), np.float32)
    top_logprobs[:, 0], top_logprobs[:, 1] = -array, -array - 1
    return Sampled(array, -array.astype(np.float32), top_ids, top_logprobs)


def make_result(
    items: Sequence[InputRow],
    *,
    ids: Sequence[int] = (),
    hidden: np.ndarray | None = None,
    outputs: Sequence[int] | None = None,
    error: Exception | None = None,
) -> StepResult:
    """Return a step that has run all of some rows.

    Args:
        items: The rows.
        ids: At the tail, what was sampled.
        hidden: Elsewhere, what came out.
        outputs: Of each row; by default one for each of its tokens.
        error: Why it failed, if it did.
    """
    counts = outputs or [len(item.inputs) for item in items]
    rows = tuple(
        RowResult(
            owner=item.owner,
            session=item.session,
            kind=item.kind,
            position=item.position,
            tokens=len(item.inputs),
            first=sum(counts[:number]),
            outputs=counts[number],
            arrived_s=item.arrived_s,
            codec_s=item.codec_s,
        )
        for number, item in enumerate(items)
    )
    sampled = make_sampled(ids) if hidden is None else None
    output = None if error else StepOutput(hidden, sampled)
    return StepResult(
        rows=rows, output=output, free_s=0.0, started_s=1.0, finished_s=2.0, error=error
    )
