from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pals.net.early import EARLY_BYTES, EARLY_ROWS, EARLY_S, MAX_REMEMBERED, EarlyRows
from pals.types import PeerId, SessionId

ONE, OTHER = PeerId("one"), PeerId("other")


def session(number: int) -> SessionId:
    return SessionId(number.to_bytes(16, "big"))


def test_rows_are_given_back_once_in_the_order_in_which_they_came() -> None:
    early: EarlyRows[str] = EarlyRows()
    for row in "abc":
        early.keep(ONE, session(1), row, 1, 0.0)
    early.keep(ONE, session(2), "x", 1, 0.0)
    assert early.take(ONE, session(1)) == ["a", "b", "c"]
    assert early.take(ONE, session(1)) == []
    assert len(early) == 1


def test_rows_of_one_peer_are_not_those_of_another() -> None:
    early: EarlyRows[str] = EarlyRows()
    early.keep(ONE, session(1), "a", 1, 0.0)
    assert early.take(OTHER, session(1)) == []
    assert early.take(ONE, session(1)) == ["a"]


def test_rows_that_wait_too_long_are_given_up_and_their_session_is_told_so_once() -> None:
    early: EarlyRows[str] = EarlyRows()
    early.keep(ONE, session(1), "a", 1, 0.0)
    early.keep(ONE, session(2), "b", 1, 1.0)
    early.expire(EARLY_S + 0.5)
    early.keep(ONE, session(1), "late", 1, EARLY_S + 0.6)
    assert len(early) == 1
    assert early.take(ONE, session(1)) is None
    assert early.take(ONE, session(1)) == []
    assert early.take(ONE, session(2)) == ["b"]


def test_a_peer_that_sends_too_much_loses_its_oldest_sessions_and_no_others() -> None:
    early: EarlyRows[str] = EarlyRows()
    early.keep(OTHER, session(0), "other", EARLY_BYTES, 0.0)
    for number in range(1, 4):
        early.keep(ONE, session(number), "row", EARLY_BYTES // 2, 0.0)
    assert early.take(OTHER, session(0)) == ["other"]
    assert early.take(ONE, session(1)) is None
    assert early.take(ONE, session(2)) == early.take(ONE, session(3)) == ["row"]


def test_a_row_that_never_fits_is_given_up() -> None:
    early: EarlyRows[str] = EarlyRows()
    early.keep(ONE, session(1), "row", EARLY_BYTES + 1, 0.0)
    assert len(early) == 0
    assert early.take(ONE, session(1)) is None


def test_what_a_lost_peer_sent_is_forgotten() -> None:
    early: EarlyRows[str] = EarlyRows()
    early.keep(ONE, session(1), "a", 1, 0.0)
    early.forget_peer(ONE)
    assert len(early) == 0
    assert early.take(ONE, session(1)) == []


def test_a_session_that_is_over_is_so_until_it_is_opened_again() -> None:
    early: EarlyRows[str] = EarlyRows()
    early.keep(ONE, session(1), "a", 1, 0.0)
    early.note_over(session(1))
    assert len(early) == 0
    assert early.is_over(session(1))
    assert early.take(ONE, session(1)) == []
    assert not early.is_over(session(1))


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["keep", "keep", "keep", "take", "over", "expire", "forget"]),
            st.sampled_from([ONE, OTHER]),
            st.integers(0, 6),
            st.sampled_from([0, 1, EARLY_BYTES // 3, EARLY_BYTES]),
        ),
        max_size=60,
    )
)
def test_whatever_comes_is_given_back_whole_or_not_at_all_and_stays_within_bounds(
    script: list[tuple[str, PeerId, int, int]],
) -> None:
    early: EarlyRows[int] = EarlyRows()
    sent: dict[tuple[PeerId, SessionId], list[int]] = {}
    for now, (action, peer, number, size) in enumerate(script):
        key = peer, session(number)
        if action == "keep":
            early.keep(*key, now, size, float(now))
            sent.setdefault(key, []).append(now)
        elif action == "take":
            taken = early.take(*key)
            assert taken is None or taken == sent.get(key, [])
            sent.pop(key, None)
        elif action == "over":
            early.note_over(key[1])
            sent = {kept: rows for kept, rows in sent.items() if kept[1] != key[1]}
        elif action == "expire":
            early.expire(float(now))
        else:
            early.forget_peer(peer)
            sent = {kept: rows for kept, rows in sent.items() if kept[0] != peer}
        for of_peer in early._peers.values():
            waiting = of_peer.waiting.values()
            assert of_peer.size == sum(w.size for w in waiting) <= EARLY_BYTES
            assert of_peer.rows == sum(len(w.rows) for w in waiting) <= EARLY_ROWS


def test_what_is_remembered_is_bounded() -> None:
    early: EarlyRows[int] = EarlyRows()
    for number in range(MAX_REMEMBERED + EARLY_ROWS + 10):
        early.keep(ONE, session(number), number, 1, 0.0)
        early.note_over(session(number + 1_000_000))
    of_peer = early._peers[ONE]
    assert (len(of_peer.lost), of_peer.rows, len(early._over)) == (
        MAX_REMEMBERED,
        EARLY_ROWS,
        MAX_REMEMBERED,
    )
