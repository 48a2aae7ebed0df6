from __future__ import annotations

from typing import cast

import ml_dtypes
import numpy as np
import pytest

from pals.engine.scheduler import WorkItem
from pals.engine.worker import StepResult
from pals.errors import PalsError, PeerUnreachable
from pals.net.control import Hop
from pals.net.links import Links
from pals.net.outbound import Outbound, Tokens
from pals.net.ring import ShardSession
from pals.net.wire import FLAG_LAST, Lane, Outgoing, Rows, check_rows, hidden_shape, sampled_shape
from pals.types import PeerId, Sampling, SessionId

HIDDEN = hidden_shape(b"m" * 32, 1, "bf16", 4)
SAMPLED = sampled_shape(b"m" * 32, 2)
ONE, OTHER = PeerId("one"), PeerId("other")


class FakeLinks:
    """Notes what is sent; some peers have no link."""

    def __init__(self) -> None:
        self.sent: dict[PeerId, tuple[Lane, Outgoing]] = {}
        self.gone: set[PeerId] = set()

    def send(self, peer: PeerId, lane: Lane, outgoing: Outgoing) -> None:
        if peer in self.gone:
            raise PeerUnreachable(peer=peer, problem="no link")
        assert peer not in self.sent, "a second frame of one step"
        self.sent[peer] = lane, outgoing
        size = sum(len(part) for part in outgoing.payload)
        check_rows(peer, outgoing.shape, outgoing.rows, size)

    def payload(self, peer: PeerId) -> bytes:
        return b"".join(self.sent[peer][1].payload)


class Bench:
    def __init__(self) -> None:
        self.links = FakeLinks()
        self.unsent: list[tuple[ShardSession, PalsError, PeerId]] = []
        self.outbound = Outbound(cast("Links", self.links), self._note_unsent)

    def _note_unsent(self, session: ShardSession, error: PalsError, peer: PeerId) -> None:
        self.unsent.append((session, error, peer))


def make_session(number: int, receiver: PeerId) -> ShardSession:
    return ShardSession(
        session=SessionId(bytes([number]) * 16),
        driver=PeerId("driver"),
        upstream=PeerId("driver"),
        ring_upstream=PeerId("tail"),
        downstream=Hop(peer=receiver, start=1, stop=2),
        head=Hop(peer="head", start=0, stop=1),
        slot=number,
        prompt_tokens=3,
        max_new_tokens=4,
        stop_token_ids=frozenset(),
        sampling=Sampling(),
        last_seen=0.0,
    )


def make_step(sessions: list[ShardSession], *, tokens_each: int, is_decode: bool) -> StepResult:
    items = [
        WorkItem(
            session=session,
            slot=session.slot,
            position=10 + session.slot,
            inputs=np.zeros(tokens_each, np.int32),
            sampling=None,
            is_decode=is_decode,
            arrived_s=0.0,
            codec_s=0.0,
        )
        for session in sessions
    ]
    count = len(sessions) * tokens_each
    states = np.arange(4 * count, dtype=np.float32).reshape(count, 4).astype(ml_dtypes.bfloat16)
    return StepResult(items=items, outputs=states, free_s=0.0, started_s=0.0, finished_s=0.0)


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_rows_of_one_peer_leave_in_one_frame_from_the_memory_of_the_step(bench: Bench) -> None:
    sessions = [make_session(number, ONE) for number in range(3)]
    step = make_step(sessions, tokens_each=1, is_decode=True)
    bench.outbound.send_hidden(HIDDEN, step, sessions)

    lane, outgoing = bench.links.sent[ONE]
    assert lane is Lane.DECODE
    ids = tuple(session.session for session in sessions)
    assert outgoing.rows == Rows(ids, (10, 11, 12), (1, 1, 1), (0, 0, 0))
    (payload,) = outgoing.payload
    assert np.shares_memory(np.frombuffer(payload, np.uint8), step.outputs.view(np.uint8))


def test_rows_of_several_peers_leave_apart_and_those_of_ended_sessions_not_at_all(
    bench: Bench,
) -> None:
    sessions = [make_session(number, (ONE, OTHER)[number % 2]) for number in range(4)]
    step = make_step(sessions, tokens_each=1, is_decode=True)
    bench.outbound.send_hidden(HIDDEN, step, [*sessions[:2], None, sessions[3]])

    rows = {peer: outgoing.rows for peer, (_, outgoing) in bench.links.sent.items()}
    assert rows == {
        ONE: Rows((sessions[0].session,), (10,), (1,), (0,)),
        OTHER: Rows((sessions[1].session, sessions[3].session), (11, 13), (1, 1), (0, 0)),
    }
    assert bench.links.payload(ONE) == step.outputs[:1].tobytes()
    assert bench.links.payload(OTHER) == step.outputs[[1, 3]].tobytes()


def test_chunk_leaves_as_one_row_on_its_own_lane(bench: Bench) -> None:
    session = make_session(1, ONE)
    step = make_step([session], tokens_each=5, is_decode=False)
    bench.outbound.send_hidden(HIDDEN, step, [session])

    lane, outgoing = bench.links.sent[ONE]
    assert lane is Lane.PREFILL
    assert outgoing.rows == Rows((session.session,), (11,), (5,), (0,))
    assert bench.links.payload(ONE) == step.outputs.tobytes()


def test_tokens_leave_in_one_frame_a_peer_and_say_which_is_the_last(bench: Bench) -> None:
    sessions = [make_session(number, ONE) for number in range(3)]
    tokens = Tokens()
    tokens.add(ONE, sessions[0], 7, 500)
    tokens.add(OTHER, sessions[1], 8, 70_000)
    tokens.add(ONE, sessions[2], 9, 3, last=True)
    bench.outbound.send_tokens(SAMPLED, tokens)

    ids = sessions[0].session, sessions[2].session
    lane, outgoing = bench.links.sent[ONE]
    assert (lane, outgoing.rows) == (Lane.DECODE, Rows(ids, (7, 9), (1, 1), (0, FLAG_LAST)))
    assert bench.links.payload(ONE) == np.array([500, 3], "<i4").tobytes()
    assert bench.links.payload(OTHER) == np.array([70_000], "<i4").tobytes()


def test_every_session_of_a_frame_that_does_not_go_out_is_told(bench: Bench) -> None:
    bench.links.gone.add(OTHER)
    sessions = [make_session(number, (ONE, OTHER)[number % 2]) for number in range(4)]
    bench.outbound.send_hidden(HIDDEN, make_step(sessions, tokens_each=1, is_decode=True), sessions)

    assert [(session, peer) for session, _, peer in bench.unsent] == [
        (sessions[1], OTHER),
        (sessions[3], OTHER),
    ]
    assert {type(error) for _, error, _ in bench.unsent} == {PeerUnreachable}
    assert list(bench.links.sent) == [ONE]
