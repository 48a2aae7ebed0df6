from __future__ import annotations

from typing import cast

import ml_dtypes
import numpy as np
import pytest

from pals.engine.work import InputRow, StepResult
from pals.errors import PalsError, PeerUnreachable
from pals.net.control import Hop, Sampler
from pals.net.links import Links
from pals.net.outbound import Outbound, Tokens
from pals.net.ring import ShardSession
from pals.net.scores import Score, unpack_scores
from pals.net.wire import (
    FLAG_LAST,
    Lane,
    Outgoing,
    Rows,
    check_rows,
    hidden_shape,
    sampled_shape,
    scored_shape,
)
from pals.types import PeerId, SessionId
from tests.unit.net.shard_fakes import make_result, make_sampled

HIDDEN = hidden_shape(b"m" * 32, 1, "bf16", 4)
SAMPLED, SCORED = sampled_shape(b"m" * 32, 2), scored_shape(b"m" * 32, 2)
ONE, OTHER = PeerId("one"), PeerId("other")


class FakeLinks:
    """Notes what is sent; some peers have no link."""

    def __init__(self) -> None:
        self.sent: dict[PeerId, tuple[Lane, Outgoing]] = {}
        self.lanes: list[Lane] = []
        self.gone: set[PeerId] = set()

    def send(self, peer: PeerId, lane: Lane, outgoing: Outgoing) -> None:
        if peer in self.gone:
            raise PeerUnreachable(peer=peer, problem="no link")
        known = self.sent.get(peer)
        assert known is None or known[0] is not lane, "a second frame of one step on a lane"
        self.sent[peer] = lane, outgoing
        self.lanes.append(lane)
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
        prompt_tokens=10,
        max_new_tokens=9,
        stop_token_ids=frozenset(),
        sampler=Sampler(),
        is_fork=False,
        last_seen=0.0,
    )


def make_step(sessions: list[ShardSession], *tokens: int, first_at: int = 10) -> StepResult:
    """A step of one row for each session, which has so many tokens, one unless said."""
    counts = tokens or (1,) * len(sessions)
    items = [
        InputRow(
            owner=session,
            session=session.session,
            kind="decode",
            position=first_at + number,
            inputs=np.zeros(count, np.int32),
        )
        for number, (session, count) in enumerate(zip(sessions, counts, strict=True))
    ]
    total = sum(counts)
    states = np.arange(4 * total, dtype=np.float32).reshape(total, 4).astype(ml_dtypes.bfloat16)
    return make_result(items, hidden=states)


def states_of(step: StepResult) -> np.ndarray:
    assert step.output is not None
    assert step.output.hidden is not None
    return step.output.hidden


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_rows_of_one_peer_leave_in_one_frame_from_the_memory_of_the_step(bench: Bench) -> None:
    sessions = [make_session(number, ONE) for number in range(3)]
    step = make_step(sessions)
    bench.outbound.send_hidden(HIDDEN, step, sessions)

    lane, outgoing = bench.links.sent[ONE]
    assert lane is Lane.DECODE
    ids = tuple(session.session for session in sessions)
    assert outgoing.rows == Rows(ids, (10, 11, 12), (1, 1, 1), (0, 0, 0))
    (payload,) = outgoing.payload
    assert np.shares_memory(np.frombuffer(payload, np.uint8), states_of(step).view(np.uint8))


def test_rows_of_several_peers_leave_apart_and_those_of_ended_sessions_not_at_all(
    bench: Bench,
) -> None:
    sessions = [make_session(number, (ONE, OTHER)[number % 2]) for number in range(4)]
    step = make_step(sessions)
    bench.outbound.send_hidden(HIDDEN, step, [*sessions[:2], None, sessions[3]])

    rows = {peer: outgoing.rows for peer, (_, outgoing) in bench.links.sent.items()}
    assert rows == {
        ONE: Rows((sessions[0].session,), (10,), (1,), (0,)),
        OTHER: Rows((sessions[1].session, sessions[3].session), (11, 13), (1, 1), (0, 0)),
    }
    assert bench.links.payload(ONE) == states_of(step)[:1].tobytes()
    assert bench.links.payload(OTHER) == states_of(step)[[1, 3]].tobytes()


def test_rows_of_a_prompt_leave_on_their_own_lane(bench: Bench) -> None:
    decoding, prompting = make_session(1, OTHER), make_session(2, ONE)
    step = make_step([decoding, prompting], 1, 5, first_at=4)
    decoding.prompt_tokens = 4
    bench.outbound.send_hidden(HIDDEN, step, [decoding, prompting])

    lane, outgoing = bench.links.sent[ONE]
    assert lane is Lane.PREFILL
    assert outgoing.rows == Rows((prompting.session,), (5,), (5,), (0,))
    assert bench.links.payload(ONE) == states_of(step)[1:].tobytes()
    lane, outgoing = bench.links.sent[OTHER]
    assert lane is Lane.DECODE
    assert outgoing.rows == Rows((decoding.session,), (4,), (1,), (0,))


def test_one_peer_gets_a_frame_on_each_lane(bench: Bench) -> None:
    decoding, prompting = make_session(1, ONE), make_session(2, ONE)
    decoding.prompt_tokens = 4
    step = make_step([decoding, prompting], 1, 5, first_at=4)
    bench.outbound.send_hidden(HIDDEN, step, [decoding, prompting])
    assert bench.links.lanes == [Lane.DECODE, Lane.PREFILL]


def test_rows_of_several_tokens_leave_with_all_of_them(bench: Bench) -> None:
    sessions = [make_session(number, (ONE, OTHER, ONE)[number]) for number in range(3)]
    step = make_step(sessions, 2, 3, 1)
    bench.outbound.send_hidden(HIDDEN, step, sessions)

    _, outgoing = bench.links.sent[ONE]
    assert outgoing.rows.num_tokens == (2, 1)
    assert bench.links.payload(ONE) == states_of(step)[[0, 1, 5]].tobytes()
    assert bench.links.payload(OTHER) == states_of(step)[2:5].tobytes()


def test_tokens_leave_in_one_frame_a_peer_and_say_which_is_the_last(bench: Bench) -> None:
    sessions = [make_session(number, ONE) for number in range(3)]
    tokens = Tokens()
    tokens.add(ONE, sessions[0], 7, [500])
    tokens.add(OTHER, sessions[1], 8, [70_000])
    tokens.add(ONE, sessions[2], 9, [3], last=True)
    bench.outbound.send_tokens(SAMPLED, tokens)

    ids = sessions[0].session, sessions[2].session
    lane, outgoing = bench.links.sent[ONE]
    assert (lane, outgoing.rows) == (Lane.DECODE, Rows(ids, (7, 9), (1, 1), (0, FLAG_LAST)))
    assert bench.links.payload(ONE) == np.array([500, 3], "<i4").tobytes()
    assert bench.links.payload(OTHER) == np.array([70_000], "<i4").tobytes()


def test_scored_tokens_leave_with_what_is_said_of_them(bench: Bench) -> None:
    sessions = [make_session(number, ONE) for number in range(2)]
    places = Tokens()
    places.add(ONE, sessions[0], 7, [2])
    places.add(ONE, sessions[1], 8, [0, 1])
    bench.outbound.send_scores(SCORED, places, make_sampled([5, 6, 7]))

    lane, outgoing = bench.links.sent[ONE]
    assert (lane, outgoing.rows.num_tokens) == (Lane.DECODE, (1, 2))
    scores = unpack_scores(ONE, bench.links.payload(ONE))
    assert scores == [Score(id, -id, ((id, -id), (id + 1, -id - 1))) for id in (7, 5, 6)]


def test_every_session_of_a_frame_that_does_not_go_out_is_told(bench: Bench) -> None:
    bench.links.gone.add(OTHER)
    sessions = [make_session(number, (ONE, OTHER)[number % 2]) for number in range(4)]
    bench.outbound.send_hidden(HIDDEN, make_step(sessions), sessions)

    assert [(session, peer) for session, _, peer in bench.unsent] == [
        (sessions[1], OTHER),
        (sessions[3], OTHER),
    ]
    assert {type(error) for _, error, _ in bench.unsent} == {PeerUnreachable}
    assert list(bench.links.sent) == [ONE]
