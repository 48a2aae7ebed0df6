from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from pals.errors import InvalidFrame, SessionRefused, ShardFull
from pals.net.control import Hop, Open
from pals.net.ring import MAX_SESSIONS_PER_PEER, SessionTable, ShardSession
from pals.net.wire import Lane, Row
from pals.types import EngineLimits, LayerRange, PeerId, Sampling, SessionId

DRIVER, HEAD, LOCAL, TAIL, OTHER = map(PeerId, ("driver", "head", "local", "tail", "other"))
NUM_LAYERS = 6
LIMITS = EngineLimits(max_sessions=3, max_context_tokens=32, max_chunk_tokens=8)
IDLE_S = 60.0
MIDDLE_CHAIN = ((HEAD, 0, 2), (LOCAL, 2, 4), (TAIL, 4, 6))
HEAD_CHAIN = ((LOCAL, 0, 2), (OTHER, 2, 4), (TAIL, 4, 6))
TAIL_CHAIN = ((HEAD, 0, 4), (LOCAL, 4, 6))
ONE_SHARD = ((LOCAL, 0, 6),)
SESSION = SessionId(b"s" * 16)


def make_table(layers: str = "2:4", limits: EngineLimits = LIMITS) -> SessionTable:
    return SessionTable(
        local=LOCAL,
        layers=LayerRange.parse(layers),
        num_layers=NUM_LAYERS,
        limits=limits,
        idle_s=IDLE_S,
    )


def make_open(
    chain: Sequence[tuple[str, int, int]] = MIDDLE_CHAIN,
    *,
    session: SessionId = SESSION,
    prompt: int = 5,
    new: int = 3,
    stop: tuple[int, ...] = (),
) -> Open:
    hops = tuple(Hop(peer=peer, start=start, stop=end) for peer, start, end in chain)
    return Open(
        session=session, chain=hops, prompt_tokens=prompt, max_new_tokens=new, stop_token_ids=stop
    )


def open_one(table: SessionTable, message: Open | None = None, now: float = 0.0) -> ShardSession:
    return table.open(DRIVER, message or make_open(), now)


def take(
    table: SessionTable,
    position: int,
    tokens: int = 1,
    *,
    sender: PeerId = HEAD,
    lane: Lane = Lane.PREFILL,
    now: float = 0.0,
) -> ShardSession | None:
    return table.take_row(sender, lane, Row(SESSION, position, tokens), now)


# --- opening -------------------------------------------------------------------------


def test_middle_shard_knows_its_neighbours() -> None:
    session = open_one(make_table())
    assert (session.driver, session.upstream, session.ring_upstream) == (DRIVER, HEAD, HEAD)
    assert session.downstream is not None
    assert session.downstream.peer == TAIL
    assert session.head.peer == HEAD
    assert session.peers == {DRIVER, HEAD, TAIL}


def test_head_takes_the_prompt_from_the_driver_and_tokens_from_the_tail() -> None:
    session = open_one(make_table("0:2"), make_open(HEAD_CHAIN))
    assert (session.upstream, session.ring_upstream) == (DRIVER, TAIL)
    assert session.downstream is not None
    assert session.downstream.peer == OTHER
    assert session.peers == {DRIVER, TAIL, OTHER}


def test_tail_sends_tokens_to_the_head() -> None:
    session = open_one(make_table("4:6"), make_open(TAIL_CHAIN))
    assert session.downstream is None
    assert session.head.peer == HEAD
    assert (session.upstream, session.ring_upstream) == (HEAD, HEAD)


def test_single_shard_is_its_own_ring() -> None:
    session = open_one(make_table("0:6"), make_open(ONE_SHARD))
    assert (session.upstream, session.ring_upstream, session.downstream) == (DRIVER, LOCAL, None)
    assert session.head.peer == LOCAL


def test_session_keeps_what_the_driver_asked_for() -> None:
    message = Open(
        session=SESSION,
        chain=make_open().chain,
        prompt_tokens=5,
        max_new_tokens=3,
        stop_token_ids=(2, 7),
        temperature=0.5,
        top_p=0.9,
        seed=11,
    )
    session = open_one(make_table(), message, now=4.0)
    assert session.session == SESSION
    assert session.sampling == Sampling(temperature=0.5, top_p=0.9, seed=11)
    assert session.stop_token_ids == {2, 7}
    assert (session.prompt_tokens, session.max_new_tokens, session.last_seen) == (5, 3, 4.0)
    assert (session.position, session.sampled_tokens) == (0, 0)


@pytest.mark.parametrize(
    "chain",
    [
        pytest.param(((LOCAL, 2, 4), (TAIL, 4, 6)), id="no head"),
        pytest.param(((HEAD, 0, 2), (LOCAL, 2, 4)), id="no tail"),
        pytest.param(((HEAD, 0, 1), (LOCAL, 2, 4), (TAIL, 4, 6)), id="gap"),
        pytest.param(((HEAD, 0, 3), (LOCAL, 2, 4), (TAIL, 4, 6)), id="overlap"),
        pytest.param(((HEAD, 0, 2), (LOCAL, 2, 4), (LOCAL, 2, 4), (TAIL, 4, 6)), id="hop twice"),
        pytest.param(((HEAD, 0, 2), (LOCAL, 2, 4), (TAIL, 4, 7)), id="past the model"),
        pytest.param(((TAIL, 4, 6), (LOCAL, 2, 4), (HEAD, 0, 2)), id="backwards"),
        pytest.param(((HEAD, 0, 2), (OTHER, 2, 2), (LOCAL, 2, 4), (TAIL, 4, 6)), id="empty range"),
        pytest.param(((HEAD, 0, 2), (OTHER, 2, 1), (LOCAL, 1, 4), (TAIL, 4, 6)), id="negative"),
        pytest.param(((HEAD, 0, 2), (OTHER, 2, 4), (TAIL, 4, 6)), id="without this shard"),
        pytest.param(((HEAD, 0, 2), (LOCAL, 2, 5), (TAIL, 5, 6)), id="foreign layers"),
        pytest.param(((LOCAL, 0, 2), (LOCAL, 2, 4), (TAIL, 4, 6)), id="this peer twice"),
        pytest.param(((HEAD, 0, 2), (LOCAL, 2, 4), (LOCAL, 4, 6)), id="this peer as the tail too"),
    ],
)
def test_chain_that_does_not_fit_is_refused_and_keeps_no_slot(
    chain: Sequence[tuple[str, int, int]],
) -> None:
    table = make_table()
    with pytest.raises(SessionRefused) as caught:
        open_one(table, make_open(chain))
    assert caught.value.fields["peer"] == LOCAL
    assert (len(table), table.free_slots) == (0, 3)


def test_context_is_bounded_by_prompt_and_answer_together() -> None:
    table = make_table()
    with pytest.raises(SessionRefused) as caught:
        open_one(table, make_open(prompt=30, new=3))
    assert caught.value.fields["problem"] == "33 tokens, the shard takes 32 a session"
    assert table.free_slots == 3
    assert open_one(table, make_open(prompt=30, new=2))


def test_open_session_is_not_opened_again() -> None:
    table = make_table()
    first = open_one(table)
    for driver in (DRIVER, OTHER):
        with pytest.raises(SessionRefused):
            table.open(driver, make_open(), 0.0)
    assert table.get(SESSION) is first
    assert (len(table), table.free_slots) == (1, 2)


def test_full_shard_says_so() -> None:
    table = make_table()
    slots = {open_one(table, make_open(session=SessionId(bytes([i]) * 16))).slot for i in range(3)}
    assert slots == {0, 1, 2}
    with pytest.raises(ShardFull) as caught:
        open_one(table)
    assert caught.value.fields == {"slots": 3}
    assert len(table) == 3


def open_for(table: SessionTable, driver: PeerId, count: int, now: float = 0.0) -> None:
    for _ in range(count):
        session = SessionId(len(table).to_bytes(8, "big") + driver.encode().ljust(8)[:8])
        table.open(driver, make_open(session=session), now)


def eight_slots() -> SessionTable:
    return make_table(
        limits=EngineLimits(max_sessions=8, max_context_tokens=32, max_chunk_tokens=8)
    )


def test_lone_driver_may_use_every_slot() -> None:
    table = eight_slots()
    open_for(table, DRIVER, 8)
    assert table.yield_slot(DRIVER) is None
    assert len(table) == 8


def test_full_shard_yields_the_quietest_sessions_of_who_has_most_up_to_a_quarter() -> None:
    table = eight_slots()
    open_for(table, OTHER, 2, now=0.0)
    open_for(table, DRIVER, 3, now=5.0)
    open_for(table, DRIVER, 3, now=1.0)
    for number in range(2):
        yielded = table.yield_slot(TAIL)
        assert yielded is not None
        assert (yielded.driver, yielded.last_seen) == (DRIVER, 1.0)
        table.open(TAIL, make_open(session=SessionId(bytes([number]) * 16)), 9.0)
    assert table.yield_slot(TAIL) is None
    assert table.yield_slot(OTHER) is None


def test_slot_is_not_yielded_while_one_is_free() -> None:
    table = eight_slots()
    open_for(table, DRIVER, 7)
    assert table.yield_slot(OTHER) is None


def test_nobody_yields_what_is_guaranteed() -> None:
    table = make_table()
    for driver in (DRIVER, OTHER, HEAD):
        open_for(table, driver, 1)
    assert table.yield_slot(TAIL) is None


def test_sessions_of_one_driver_are_limited() -> None:
    table = make_table(
        limits=EngineLimits(max_sessions=300, max_context_tokens=32, max_chunk_tokens=8)
    )
    open_for(table, DRIVER, MAX_SESSIONS_PER_PEER)
    with pytest.raises(SessionRefused, match="256"):
        open_one(table)
    open_for(table, OTHER, 1)


# --- rows ----------------------------------------------------------------------------


def test_session_runs_from_prompt_to_decode() -> None:
    table = make_table()
    session = open_one(table)
    assert take(table, 0, 3, now=1.0) is session
    assert take(table, 3, 2, now=2.0) is session
    assert take(table, 5, lane=Lane.DECODE, now=3.0) is session
    assert take(table, 6, lane=Lane.DECODE, now=4.0) is session
    assert (session.position, session.last_seen) == (7, 4.0)


def test_head_changes_its_upstream_after_the_prompt() -> None:
    table = make_table("0:2")
    open_one(table, make_open(HEAD_CHAIN))
    with pytest.raises(InvalidFrame):
        take(table, 0, 5, sender=TAIL)
    assert take(table, 0, 5, sender=DRIVER)
    with pytest.raises(InvalidFrame):
        take(table, 5, sender=DRIVER, lane=Lane.DECODE)
    assert take(table, 5, sender=TAIL, lane=Lane.DECODE)


@pytest.mark.parametrize("sender", [DRIVER, TAIL, OTHER, LOCAL])
@pytest.mark.parametrize("taken", [0, 5])
def test_row_of_the_wrong_sender_is_refused(sender: PeerId, taken: int) -> None:
    table = make_table()
    session = open_one(table)
    if taken:
        take(table, 0, taken)
    lane = Lane.DECODE if taken else Lane.PREFILL
    with pytest.raises(InvalidFrame) as caught:
        take(table, taken, sender=sender, lane=lane, now=9.0)
    assert caught.value.fields["peer"] == sender
    assert (session.position, session.last_seen) == (taken, 0.0)


@pytest.mark.parametrize(
    ("taken", "lane"),
    [(0, Lane.DECODE), (0, Lane.CONTROL), (3, Lane.DECODE), (5, Lane.PREFILL), (5, Lane.CONTROL)],
)
def test_row_on_the_wrong_lane_is_refused(taken: int, lane: Lane) -> None:
    table = make_table()
    session = open_one(table)
    if taken:
        take(table, 0, taken)
    with pytest.raises(InvalidFrame):
        take(table, taken, lane=lane)
    assert session.position == taken


@pytest.mark.parametrize(
    ("taken", "position"), [(0, 1), (3, 0), (3, 2), (3, 4), (5, 4), (5, 6), (5, 2**32 - 1)]
)
def test_row_at_the_wrong_position_is_refused(taken: int, position: int) -> None:
    table = make_table()
    session = open_one(table)
    if taken:
        take(table, 0, taken)
    with pytest.raises(InvalidFrame):
        take(table, position, lane=Lane.DECODE if taken == 5 else Lane.PREFILL)
    assert session.position == taken


@pytest.mark.parametrize(("taken", "tokens"), [(0, 6), (3, 3), (0, 65535), (5, 2)])
def test_row_past_the_prompt_or_of_several_decode_tokens_is_refused(
    taken: int, tokens: int
) -> None:
    table = make_table()
    session = open_one(table)
    if taken:
        take(table, 0, taken)
    with pytest.raises(InvalidFrame):
        take(table, taken, tokens, lane=Lane.DECODE if taken == 5 else Lane.PREFILL)
    assert session.position == taken


def test_rows_end_at_the_context_limit() -> None:
    table = make_table()
    session = open_one(table, make_open(prompt=30, new=2))
    take(table, 0, 30)
    take(table, 30, lane=Lane.DECODE)
    take(table, 31, lane=Lane.DECODE)
    with pytest.raises(InvalidFrame):
        take(table, 32, lane=Lane.DECODE)
    assert session.position == 32


def test_row_of_no_session_is_no_fault() -> None:
    table = make_table()
    assert take(table, 0) is None
    open_one(table)
    table.close(SESSION, DRIVER)
    assert take(table, 0, sender=OTHER, lane=Lane.CONTROL) is None


# --- sampling ------------------------------------------------------------------------


def test_last_sample_is_a_stop_token_or_the_limit() -> None:
    table = make_table("4:6")
    session = open_one(table, make_open(TAIL_CHAIN, new=3, stop=(2,)))
    assert [table.take_sample(session, token) for token in (9, 9, 9)] == [False, False, True]
    session = open_one(table, make_open(TAIL_CHAIN, session=SessionId(bytes(16)), new=3, stop=(2,)))
    assert [table.take_sample(session, token) for token in (9, 2)] == [False, True]
    assert session.sampled_tokens == 2


# --- ending --------------------------------------------------------------------------


@pytest.mark.parametrize("sender", [HEAD, TAIL, OTHER, LOCAL])
def test_only_the_driver_closes_a_session(sender: PeerId) -> None:
    table = make_table()
    session = open_one(table)
    table.close(SESSION, sender)
    assert table.get(SESSION) is session
    table.close(SESSION, DRIVER)
    table.close(SESSION, DRIVER)
    assert table.get(SESSION) is None
    assert table.free_slots == 3


@pytest.mark.parametrize("peer", [DRIVER, HEAD, TAIL])
def test_lost_neighbour_ends_its_sessions_only(peer: PeerId) -> None:
    table = make_table()
    session = open_one(table)
    chain = ((OTHER, 0, 2), (LOCAL, 2, 4), (PeerId("another"), 4, 6))
    survivor = table.open(OTHER, make_open(chain, session=SessionId(bytes(16))), 0.0)
    assert table.remove_peer(peer) == [session]
    assert table.remove_peer(peer) == []
    assert table.get(survivor.session) is survivor
    assert table.free_slots == 2


def test_lost_stranger_ends_nothing() -> None:
    table = make_table()
    open_one(table)
    assert table.remove_peer(OTHER) == []
    assert len(table) == 1


def test_idle_session_ends_only_after_its_time() -> None:
    table = make_table()
    session = open_one(table, now=100.0)
    take(table, 0, now=130.0)
    assert table.remove_idle(130.0 + IDLE_S) == []
    assert table.remove_idle(130.5 + IDLE_S) == [session]
    assert table.free_slots == 3


def test_refused_row_does_not_keep_a_session_alive() -> None:
    table = make_table()
    session = open_one(table)
    with pytest.raises(InvalidFrame):
        take(table, 3, now=IDLE_S)
    assert table.remove_idle(IDLE_S + 1) == [session]


def test_ended_session_does_not_take_its_successor_of_the_same_id_along() -> None:
    table = make_table()
    ended = open_one(table)
    table.close(SESSION, DRIVER)
    occupant = open_one(table, make_open(session=SessionId(bytes(16))))
    successor = open_one(table)
    table.remove(ended)
    assert table.get(SESSION) is successor
    assert {occupant.slot, successor.slot} < {0, 1, 2}
    assert table.free_slots == 1
    assert ended != successor


PEERS = st.sampled_from([DRIVER, HEAD, TAIL, OTHER, LOCAL])
IDS = st.sampled_from([SessionId(bytes([i]) * 16) for i in range(5)])
CHAINS = st.sampled_from(
    [
        MIDDLE_CHAIN,
        ((OTHER, 0, 2), (LOCAL, 2, 4), (HEAD, 4, 6)),
        ((LOCAL, 0, 2), (LOCAL, 2, 4), (TAIL, 4, 6)),
        HEAD_CHAIN,
    ]
)


class SlotsAreNeverLostOrShared(RuleBasedStateMachine):
    """Peers do what they like, in any order, with few ids so that these come again."""

    def __init__(self) -> None:
        super().__init__()
        self.table = make_table()
        self.now = 0.0
        self.ever: list[ShardSession] = []
        self.live: dict[SessionId, ShardSession] = {}

    def ended(self, sessions: Sequence[ShardSession]) -> None:
        for session in sessions:
            assert self.live.pop(session.session) is session

    @rule(driver=PEERS, session=IDS, chain=CHAINS, prompt=st.integers(1, 33))
    def open(
        self, driver: PeerId, session: SessionId, chain: tuple[tuple[str, int, int]], prompt: int
    ) -> None:
        try:
            opened = self.table.open(
                driver, make_open(chain, session=session, prompt=prompt, new=1), self.now
            )
        except ShardFull:
            assert len(self.live) == LIMITS.max_sessions
        except SessionRefused:
            first_of_its_id = session not in self.live
            fits = prompt < 32 and chain.count((LOCAL, 2, 4)) == 1 and chain[0][0] != LOCAL
            assert not (first_of_its_id and fits)
        else:
            assert session not in self.live
            self.ever.append(opened)
            self.live[session] = opened

    @rule(sender=PEERS, session=IDS, lane=st.sampled_from(Lane), tokens=st.integers(1, 6))
    def row(self, sender: PeerId, session: SessionId, lane: Lane, tokens: int) -> None:
        known = self.live.get(session)
        position = known.position if known else 0
        try:
            taken = self.table.take_row(sender, lane, Row(session, position, tokens), self.now)
        except InvalidFrame:
            assert known is not None
            assert known.position == position
        else:
            assert taken is known
            assert known is None or known.position == position + tokens <= 32

    @rule(driver=PEERS)
    def yield_slot(self, driver: PeerId) -> None:
        yielded = self.table.yield_slot(driver)
        if yielded is not None:
            assert yielded.driver != driver
            self.ended([yielded])

    @rule(sender=PEERS, session=IDS)
    def close(self, sender: PeerId, session: SessionId) -> None:
        self.table.close(session, sender)
        if session in self.live and self.live[session].driver == sender:
            del self.live[session]

    @rule(peer=PEERS)
    def lose_peer(self, peer: PeerId) -> None:
        ended = self.table.remove_peer(peer)
        assert all(peer in session.peers for session in ended)
        self.ended(ended)
        assert not any(peer in session.peers for session in self.live.values())

    @rule(seconds=st.integers(0, 80))
    def wait(self, seconds: int) -> None:
        self.now += seconds
        self.ended(self.table.remove_idle(self.now))
        assert all(self.now - s.last_seen <= IDLE_S for s in self.live.values())

    @rule(index=st.integers(0, 20))
    def remove_any_session_that_ever_was(self, index: int) -> None:
        if not self.ever:
            return
        session = self.ever[index % len(self.ever)]
        self.table.remove(session)
        if self.live.get(session.session) is session:
            del self.live[session.session]

    @invariant()
    def every_slot_is_free_or_of_one_live_session(self) -> None:
        assert len(self.table) == len(self.live)
        assert self.table.free_slots + len(self.live) == LIMITS.max_sessions
        slots = [session.slot for session in self.live.values()]
        assert len(set(slots)) == len(slots)
        assert set(slots) <= set(range(LIMITS.max_sessions))
        for session_id, session in self.live.items():
            assert self.table.get(session_id) is session


TestSlots = SlotsAreNeverLostOrShared.TestCase
TestSlots.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
