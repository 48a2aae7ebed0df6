"""Who sends next."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from pals.net.mux_schedule import Schedule
from pals.net.mux_stream import Message, StreamState


def make_stream(stream_id: int, frames: int) -> StreamState:
    """Return a stream with this many frames to send, of which a test takes one a turn."""
    stream = StreamState(stream_id, is_outbound=True, heard_at=0.0)
    stream.outbox.extend(Message(memoryview(b"x")) for _ in range(frames))
    return stream


def take_turns(schedule: Schedule, count: int) -> list[int]:
    order = []
    while len(order) < count and (stream := schedule.next()):
        stream.outbox.popleft()
        order.append(stream.stream_id)
    return order


def test_streams_take_turns_and_one_that_starts_goes_first():
    schedule = Schedule()
    for stream_id in (1, 3):
        schedule.add(make_stream(stream_id, 4))
    assert take_turns(schedule, 3) == [1, 3, 1]

    schedule.add(make_stream(5, 2))

    assert take_turns(schedule, 10) == [5, 3, 1, 5, 3, 1, 3]


def test_one_without_allowance_or_bytes_is_passed_over():
    schedule = Schedule()
    stuck, idle, ready = make_stream(1, 2), make_stream(3, 0), make_stream(5, 1)
    stuck.allowance = 0
    for stream in (stuck, idle, ready):
        schedule.add(stream)

    assert take_turns(schedule, 5) == [5]
    assert schedule.next() is None
    stuck.allowance = 1
    schedule.add(stuck)
    assert take_turns(schedule, 5) == [1, 1]


def test_adding_twice_gives_one_turn():
    schedule = Schedule()
    stream = make_stream(1, 1)
    schedule.add(stream)
    schedule.add(stream)

    assert take_turns(schedule, 5) == [1]


@given(st.lists(st.integers(1, 6), min_size=2, max_size=6), st.integers(0, 20))
def test_nobody_waits_longer_than_one_turn_of_all_others(frames, late):
    schedule = Schedule()
    streams = [make_stream(index, count) for index, count in enumerate(frames)]
    for stream in streams:
        schedule.add(stream)
    take_turns(schedule, late)
    waiting = [s.stream_id for s in streams if s.outbox]

    turns = take_turns(schedule, len(waiting))

    assert Counter(turns) == Counter(waiting)
