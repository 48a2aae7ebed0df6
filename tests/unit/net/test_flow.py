from __future__ import annotations

from collections import deque

from hypothesis import given
from hypothesis import strategies as st

from pals.net.control import MAX_CONTEXT
from pals.net.flow import (
    PREFILL_WINDOW_BYTES,
    AckPolicy,
    SessionFlow,
    window_bytes,
    window_tokens,
)
from pals.net.wire import MAX_ROW_TOKENS, hidden_shape, sampled_shape, tokens_shape

MANIFEST = b"m" * 32


def make_flow(window: int, *, passes_prompt: bool = True) -> SessionFlow[int]:
    """Return the flow of a session that is admitted and linked."""
    return SessionFlow(
        inbound=AckPolicy(window),
        window=window,
        acknowledged=0,
        passes_prompt=passes_prompt,
        held=0,
        is_linked=True,
    )


def test_a_prompt_of_ids_always_fits_the_window() -> None:
    assert window_tokens(tokens_shape(MANIFEST)) >= MAX_CONTEXT


def test_a_window_of_hidden_states_is_bounded_in_bytes_but_holds_two_rows() -> None:
    narrow, wide = (hidden_shape(MANIFEST, 1, "bf16", size) for size in (512, 1 << 14))
    assert window_bytes(narrow) == PREFILL_WINDOW_BYTES
    assert window_tokens(wide) == 2 * MAX_ROW_TOKENS


def test_sampled_tokens_have_a_window_of_their_own() -> None:
    assert window_tokens(sampled_shape(MANIFEST, 4)) < MAX_ROW_TOKENS


def test_the_sender_is_told_a_few_times_a_window() -> None:
    policy = AckPolicy(window=8)
    told = [policy.take(position) for position in range(1, 10)]
    assert told == [None, 2, None, 4, None, 6, None, 8, None]


def test_the_sender_is_not_told_when_all_that_is_left_fits_its_window() -> None:
    policy = AckPolicy(window=8)
    assert [policy.take(position, end=12) for position in (2, 4, 6, 12)] == [2, 4, None, None]


def test_chunks_wait_for_room_and_leave_in_order() -> None:
    flow = make_flow(window=8)
    flow.waiting.extend((end, end) for end in (4, 8, 12, 16))
    assert flow.release() == [4, 8]
    flow.acknowledge(4)
    assert flow.release() == [12]
    flow.acknowledge(2)
    assert flow.release() == []
    flow.acknowledge(8)
    assert flow.release() == [16]


def test_nothing_has_room_before_its_receiver_can_be_reached() -> None:
    flow = make_flow(window=8)
    flow.is_linked = False
    flow.waiting.append((4, 4))
    flow.held_token = 1, 77
    assert (flow.release(), flow.release_token()) == ([], None)
    flow.is_linked = True
    assert (flow.release(), flow.release_token()) == ([4], (1, 77))


def test_nothing_of_a_prompt_runs_before_its_session_has_room() -> None:
    for passes_prompt in (False, True):
        flow = make_flow(window=8, passes_prompt=passes_prompt)
        flow.held = None
        flow.waiting.append((4, 4))
        assert (flow.is_open, flow.release()) == (False, [])
        flow.held = 0
        assert (flow.is_open, flow.release()) == (True, [4])


def test_a_prompt_that_ends_here_needs_no_room_at_a_receiver() -> None:
    flow = make_flow(window=8, passes_prompt=False)
    flow.is_linked = False
    flow.waiting.extend((end, end) for end in (8, 16, 24))
    assert flow.release() == [8, 16, 24]


def test_both_windows_begin_where_the_session_starts() -> None:
    flow = make_flow(window=8)
    flow.begin(1000)
    assert (flow.fits_inbound(1008), flow.fits_inbound(1009)) == (True, False)
    assert (flow.has_room(1008), flow.has_room(1009)) == (True, False)
    assert [flow.inbound.take(position) for position in (1001, 1002)] == [None, 1002]


def test_the_window_of_sampled_tokens_begins_behind_the_prompt_wherever_that_starts() -> None:
    flow = make_flow(window=8, passes_prompt=False)
    flow.acknowledged = 1200
    flow.begin(1000)
    assert (flow.has_room(1208), flow.has_room(1209)) == (True, False)


def test_a_token_is_held_until_its_driver_has_caught_up() -> None:
    flow = make_flow(window=8)
    assert flow.release_token() is None
    flow.held_token = 9, 77
    assert flow.release_token() is None
    flow.acknowledge(1)
    assert flow.release_token() == (9, 77)
    assert flow.release_token() is None


@given(
    window=st.integers(2, 40),
    chunks=st.lists(st.integers(1, 20), min_size=1, max_size=40),
    lag=st.integers(0, 3),
)
def test_a_sender_and_a_receiver_never_wait_for_each_other(
    window: int, chunks: list[int], lag: int
) -> None:
    """Whatever the chunks, up to half a window, and however late the news."""
    sizes = [min(chunk, window // 2) for chunk in chunks]
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    flow, receiver = make_flow(window), AckPolicy(window)
    flow.waiting.extend((end, end) for end in ends)
    arrived: deque[int] = deque()
    news: deque[int] = deque()
    while receiver.taken < ends[-1]:
        arrived.extend(flow.release())
        if arrived:
            assert arrived[-1] - receiver.taken <= window
            told = receiver.take(arrived.popleft(), ends[-1])
            if told is not None:
                news.append(told)
        else:
            assert news, "both wait"
        if len(news) > lag or (news and not arrived):
            flow.acknowledge(news.popleft())
