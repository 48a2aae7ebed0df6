"""What was received is read in any pieces; what a peer may send is counted."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pals.net.mux_stream import JOIN_BYTES, ReceiveBudget, StreamState


def make_stream(chunks: list[bytes]) -> StreamState:
    stream = StreamState(1, is_outbound=False, heard_at=0.0)
    stream.unread.extend(chunks)
    stream.unread_bytes = sum(map(len, chunks))
    return stream


@given(
    st.lists(st.binary(min_size=1, max_size=60), min_size=1, max_size=8),
    st.lists(st.integers(1, 80), min_size=1, max_size=30),
)
def test_reads_of_any_size_give_all_bytes_in_order(chunks, limits):
    stream = make_stream(chunks)
    whole, received = b"".join(chunks), b""

    while stream.unread_bytes:
        limit = limits.pop() if limits else 1000
        part = stream.take(limit)
        assert 0 < len(part) <= limit
        received += part
        assert stream.unread_bytes == len(whole) - len(received)

    assert received == whole
    assert not stream.unread
    assert not stream.offset


def test_small_chunks_are_joined_and_a_large_one_is_not_copied():
    large = bytes(JOIN_BYTES)
    stream = make_stream([b"a", b"b", large])

    assert stream.take(2) == b"ab"
    assert stream.take(1 << 20) is large


def test_a_budget_is_taken_and_given_back():
    budget = ReceiveBudget(100)

    assert budget.take(60) == 60
    assert not budget.take_all(41)
    assert budget.take_all(30)
    assert budget.take(60) == 10
    budget.overdraw(20)
    assert budget.take(1) == 0
    budget.give_back(40)
    assert budget.take(100) == 20
