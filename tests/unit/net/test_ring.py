from __future__ import annotations

from collections.abc import Sequence

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from pals.errors import InvalidFrame, SessionRefused
from pals.net.control import Fork, Hop, Open, Sampler
from pals.net.ring import MAX_ROWS_AHEAD, SessionTable, ShardSession
from pals.net.wire import Lane, Row
from pals.types import EngineLimits, LayerRange, PeerId, SessionId

DRIVER, HEAD, LOCAL, TAIL, OTHER = map(PeerId, ("driver", "head", "local", "tail", "other"))
NUM_LAYERS = 6
LIMITS = EngineLimits(max_sessions=3, max_context_tokens=32, max_chunk_tokens=8, verify_tokens=4)
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
        sampler=Sampler(temperature=0.5, top_p=0.9, seed=11),
    )
    session = open_one(make_table(), message, now=4.0)
    assert session.session == SESSION
    assert session.sampler == Sampler(temperature=0.5, top_p=0.9, seed=11)
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
def test_chain_that_does_not_fit_is_refused(
    chain: Sequence[tuple[str, int, int]],
) -> None:
    table = make_table()
    with pytest.raises(SessionRefused) as caught:
        open_one(table, make_open(chain))
    assert caught.value.fields["peer"] == LOCAL
    assert len(table) == 0


def test_context_is_bounded_by_prompt_and_answer_together() -> None:
    table = make_table()
    with pytest.raises(SessionRefused) as caught:
        open_one(table, make_open(prompt=30, new=3))
    assert caught.value.fields["problem"] == "33 tokens, the shard takes 32 a session"
    assert len(table) == 0
    assert open_one(table, make_open(prompt=30, new=2))


def test_open_session_is_not_opened_again() -> None:
    table = make_table()
    first = open_one(table)
    for driver in (DRIVER, OTHER):
        with pytest.raises(SessionRefused):
            table.open(driver, make_open(), 0.0)
    assert table.get(SESSION) is first
    assert len(table) == 1


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
    ("taken", "position"), [(3, 0), (3, 2), (3, 4), (5, 4), (5, 6), (5, 2**32 - 1)]
)
def test_row_at_the_wrong_position_is_refused(taken: int, position: int) -> None:
    table = make_table()
    session = open_one(table)
    take(table, 0, taken)
    with pytest.raises(InvalidFrame):
        take(table, position, lane=Lane.DECODE if taken == 5 else Lane.PREFILL)
    assert session.position == taken


@pytest.mark.parametrize("start", [0, 1, 4])
def test_first_row_says_where_a_session_starts(start: int) -> None:
    table = make_table()
    session = open_one(table)
    assert take(table, start) is session
    assert (session.start, session.position) == (start, start + 1)


def test_session_does_not_start_behind_its_prompt() -> None:
    table = make_table()
    session = open_one(table)
    for lane in Lane:
        with pytest.raises(InvalidFrame):
            take(table, 5, lane=lane)
    assert (session.start, session.position) == (None, 0)


def test_rows_after_the_prompt_step_back_over_what_was_drafted_wrongly() -> None:
    table = make_table()
    session = open_one(table, make_open(new=10))
    take(table, 0, 5)
    take(table, 5, 4, lane=Lane.DECODE)
    assert take(table, 6, 3, lane=Lane.DECODE) is session
    assert session.position == 9
    take(table, 5, 1, lane=Lane.DECODE)
    assert session.position == 6


@pytest.mark.parametrize(("taken", "tokens"), [(0, 6), (3, 3), (0, 65535), (5, 5), (12, 4)])
def test_row_past_the_prompt_the_draft_or_the_session_is_refused(taken: int, tokens: int) -> None:
    table = make_table()
    session = open_one(table, make_open(new=10))
    if taken:
        take(table, 0, min(taken, 5))
    for position in range(5, taken):
        take(table, position, lane=Lane.DECODE)
    with pytest.raises(InvalidFrame):
        take(table, taken, tokens, lane=Lane.DECODE if taken >= 5 else Lane.PREFILL)
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


def test_rows_that_nobody_has_computed_do_not_pile_up() -> None:
    """A neighbour that steps back for ever would else fill the queue of all sessions."""
    table = make_table()
    session = open_one(table)
    take(table, 0, 5)
    for _ in range(MAX_ROWS_AHEAD):
        take(table, 5, lane=Lane.DECODE)
    with pytest.raises(InvalidFrame):
        take(table, 5, lane=Lane.DECODE)
    table.note_computed(session, 4)
    with pytest.raises(InvalidFrame):
        take(table, 5, lane=Lane.DECODE)
    table.note_computed(session, 5)
    assert take(table, 5, lane=Lane.DECODE) is session


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
    samples = [table.take_sample(session, position, 9) for position in (5, 6, 7)]
    assert samples == [False, False, True]
    session = open_one(table, make_open(TAIL_CHAIN, session=SessionId(bytes(16)), new=3, stop=(2,)))
    assert [table.take_sample(session, 5 + n, token) for n, token in enumerate((9, 2))] == [
        False,
        True,
    ]
    assert session.sampled_tokens == 2


def test_a_step_back_takes_back_what_was_counted() -> None:
    table = make_table("4:6")
    session = open_one(table, make_open(TAIL_CHAIN, new=3))
    table.take_sample(session, 6, 9)
    assert not table.take_sample(session, 6, 8)
    assert session.sampled_tokens == 2


# --- forks ---------------------------------------------------------------------------

CHILD = SessionId(b"c" * 16)


def make_fork(position: int, **changes: object) -> Fork:
    return Fork(**{"session": SESSION, "child": CHILD, "position": position} | changes)  # type: ignore[arg-type]


def test_fork_goes_the_way_of_its_parent_and_its_first_row_is_of_a_prompt() -> None:
    table = make_table("0:2")
    parent = open_one(table, make_open(HEAD_CHAIN, new=3))
    take(table, 0, 5, sender=DRIVER)
    child = table.fork(DRIVER, make_fork(4, sampler=Sampler(seed=3)), 9.0)
    assert child.peers == parent.peers
    assert (child.prompt_tokens, child.max_new_tokens) == (5, 3)
    assert (child.start, child.position, child.last_seen) == (4, 4, 9.0)
    assert (child.sampler.seed, parent.sampler.seed) == (3, 0)
    row = Row(CHILD, 4, 1)
    with pytest.raises(InvalidFrame):
        table.take_row(TAIL, Lane.DECODE, row, 9.0)
    assert table.take_row(DRIVER, Lane.PREFILL, row, 9.0) is child
    assert table.take_row(TAIL, Lane.DECODE, Row(CHILD, 5, 1), 9.0) is child


def test_what_is_pooled_ends_with_its_prompt_and_is_not_forked() -> None:
    table = make_table("4:6")
    pooled = Sampler(pooling=True)
    open_one(table, msgspec.structs.replace(make_open(TAIL_CHAIN), sampler=pooled))
    take(table, 0, 5)
    with pytest.raises(InvalidFrame, match="pooled"):
        take(table, 5, lane=Lane.DECODE)
    with pytest.raises(SessionRefused, match="pooled"):
        table.fork(DRIVER, make_fork(4), 0.0)


def test_a_fork_is_not_pooled() -> None:
    table = make_table("4:6")
    open_one(table, make_open(TAIL_CHAIN))
    take(table, 0, 5)
    with pytest.raises(SessionRefused, match="pooled"):
        table.fork(DRIVER, make_fork(4, sampler=Sampler(pooling=True)), 0.0)


@pytest.mark.parametrize(
    ("driver", "fork"),
    [
        pytest.param(OTHER, make_fork(4), id="of another driver"),
        pytest.param(DRIVER, make_fork(4, session=bytes(16)), id="of no session"),
        pytest.param(DRIVER, make_fork(4, child=SESSION), id="of a taken id"),
        pytest.param(DRIVER, make_fork(6), id="beyond what there is"),
    ],
)
def test_fork_that_cannot_be_is_refused(driver: PeerId, fork: Fork) -> None:
    table = make_table()
    open_one(table)
    take(table, 0, 5)
    with pytest.raises(SessionRefused):
        table.fork(driver, fork, 0.0)
    assert len(table) == 1


def test_fork_leaves_a_token_to_sample() -> None:
    table = make_table()
    open_one(table, make_open(new=1))
    take(table, 0, 5)
    with pytest.raises(SessionRefused):
        table.fork(DRIVER, make_fork(5), 0.0)
    assert table.fork(DRIVER, make_fork(4), 0.0).max_new_tokens == 1


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


@pytest.mark.parametrize("peer", [DRIVER, HEAD, TAIL])
def test_lost_neighbour_ends_its_sessions_only(peer: PeerId) -> None:
    table = make_table()
    session = open_one(table)
    chain = ((OTHER, 0, 2), (LOCAL, 2, 4), (PeerId("another"), 4, 6))
    survivor = table.open(OTHER, make_open(chain, session=SessionId(bytes(16))), 0.0)
    assert table.remove_peer(peer) == [session]
    assert table.remove_peer(peer) == []
    assert table.get(survivor.session) is survivor


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
    assert len(table) == 0


def test_refused_row_does_not_keep_a_session_alive() -> None:
    table = make_table()
    session = open_one(table)
    with pytest.raises(InvalidFrame):
        take(table, 3, lane=Lane.DECODE, now=IDLE_S)
    assert table.remove_idle(IDLE_S + 1) == [session]


def test_ended_session_does_not_take_its_successor_of_the_same_id_along() -> None:
    table = make_table()
    ended = open_one(table)
    table.close(SESSION, DRIVER)
    successor = open_one(table)
    assert not table.remove(ended)
    assert table.get(SESSION) is successor
    assert (table.has(ended), table.has(successor)) == (False, True)
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


class SessionsStayWhatTheirDriversOpened(RuleBasedStateMachine):
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

    def began(self, session: ShardSession) -> None:
        assert session.session not in self.live
        self.ever.append(session)
        self.live[session.session] = session

    @rule(driver=PEERS, session=IDS, chain=CHAINS, prompt=st.integers(1, 33))
    def open(
        self, driver: PeerId, session: SessionId, chain: tuple[tuple[str, int, int]], prompt: int
    ) -> None:
        new = max(1, min(4, 32 - prompt))
        message = make_open(chain, session=session, prompt=prompt, new=new)
        try:
            opened = self.table.open(driver, message, self.now)
        except SessionRefused:
            first_of_its_id = session not in self.live
            fits = prompt < 32 and chain.count((LOCAL, 2, 4)) == 1 and chain[0][0] != LOCAL
            assert not (first_of_its_id and fits)
        else:
            self.began(opened)

    @rule(driver=PEERS, parent=IDS, child=IDS, position=st.integers(1, 33))
    def fork(self, driver: PeerId, parent: SessionId, child: SessionId, position: int) -> None:
        message = Fork(session=parent, child=child, position=position)
        try:
            forked = self.table.fork(driver, message, self.now)
        except SessionRefused:
            return
        origin = self.live[parent]
        assert origin.driver == driver == forked.driver
        assert forked.position == position <= origin.position
        assert forked.max_tokens == origin.max_tokens
        self.began(forked)

    @rule(
        sender=PEERS,
        session=IDS,
        lane=st.sampled_from(Lane),
        tokens=st.integers(1, 6),
        offset=st.integers(-3, 2),
    )
    def row(self, sender: PeerId, session: SessionId, lane: Lane, tokens: int, offset: int) -> None:
        known = self.live.get(session)
        before = known.position if known else 0
        position = max(0, before + offset)
        try:
            taken = self.table.take_row(sender, lane, Row(session, position, tokens), self.now)
        except InvalidFrame:
            assert known is not None
            assert known.position == before
            return
        assert taken is known
        if known is not None:
            self.check_row(known, before, Row(session, position, tokens), sender, lane)

    def check_row(
        self, session: ShardSession, before: int, row: Row, sender: PeerId, lane: Lane
    ) -> None:
        assert session.position == row.position + row.num_tokens <= session.max_tokens <= 32
        if row.position < session.prompt_tokens:
            assert (sender, lane) == (session.upstream, Lane.PREFILL)
            assert row.position == before or session.start == row.position
            assert session.position <= session.prompt_tokens
        else:
            assert (sender, lane) == (session.ring_upstream, Lane.DECODE)
            assert row.position <= before
            assert row.num_tokens <= LIMITS.verify_tokens

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
        is_live = self.live.get(session.session) is session
        assert self.table.remove(session) == is_live
        if is_live:
            del self.live[session.session]

    @invariant()
    def every_live_session_is_there_and_no_other(self) -> None:
        assert len(self.table) == len(self.live)
        for session_id, session in self.live.items():
            assert self.table.get(session_id) is session
            assert self.table.has(session)


TestSessions = SessionsStayWhatTheirDriversOpened.TestCase
TestSessions.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
