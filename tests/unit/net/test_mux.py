"""The muxer's core: its bytes, its windows, its ends and its deadlines."""

from __future__ import annotations

import pytest

from pals.net.mux import MAX_PAYLOAD_BYTES, MAX_WAITING_CONTROL, StreamChanged
from pals.net.mux_frames import (
    ACK,
    DATA,
    FIN,
    GO_AWAY,
    INITIAL_WINDOW_BYTES,
    PING,
    RST,
    SYN,
    WINDOW_UPDATE,
)
from tests.unit.net.muxes import Wire, frame, headers, make_mux, opened, output, problem

WINDOW = 4 << 20

# --- bytes: hashicorp/yamux, spec.md -------------------------------------------------


def test_the_bytes_of_a_stream_are_yamux_s():
    mux = make_mux(is_initiator=True)
    stream = mux.open(0.0)
    mux.queue(stream, b"hello", 0.0)
    mux.close(stream, 0.0)

    assert output(mux) == bytes.fromhex(
        "00 01 0001 00000001 00000000"  # WINDOW_UPDATE with SYN opens stream 1
        "00 00 0000 00000001 00000005 68656c6c6f"  # DATA, "hello"
        "00 01 0004 00000001 00000000"  # WINDOW_UPDATE with FIN
    )


def test_each_side_has_its_own_ids():
    dialler, listener = make_mux(is_initiator=True), make_mux()

    assert [dialler.open(0.0).stream_id for _ in range(3)] == [1, 3, 5]
    assert [listener.open(0.0).stream_id for _ in range(3)] == [2, 4, 6]


def test_a_stream_is_acknowledged_when_somebody_serves_it():
    mux = make_mux()
    mux.receive(frame(WINDOW_UPDATE, SYN, 1, 0), 0.0)
    (stream,) = opened(mux.take_events())
    assert output(mux) == b""

    mux.accept(stream)

    assert output(mux) == frame(WINDOW_UPDATE, ACK, 1, 0)


def test_a_ping_is_answered_with_its_value():
    mux = make_mux()

    mux.receive(frame(PING, SYN, 0, 0xDEADBEEF), 0.0)

    assert output(mux) == frame(PING, ACK, 0, 0xDEADBEEF)


def test_a_reset_and_a_goodbye_have_their_frames():
    mux = make_mux(is_initiator=True)
    stream = mux.open(0.0)
    output(mux)

    mux.reset(stream)
    assert output(mux) == frame(WINDOW_UPDATE, RST, 1, 0)
    mux.end("enough")
    assert output(mux) == frame(GO_AWAY, 0, 0, 0)
    assert output(mux) == b""


def test_data_may_open_and_end_a_stream_at_once():
    mux = make_mux()

    mux.receive(frame(DATA, SYN | FIN, 1, 2, b"hi"), 0.0)

    (stream,) = opened(mux.take_events())
    assert mux.read(stream, 10) == b"hi"
    assert stream.peer_closed


def test_a_large_payload_is_neither_split_nor_joined_to_its_header():
    mux = make_mux(is_initiator=True)
    stream = mux.open(0.0)
    output(mux)
    message = bytes(MAX_PAYLOAD_BYTES + 1)
    mux.queue(stream, message, 0.0)

    pieces = mux.next_batch(1 << 20, 0.0)

    assert [len(piece) for piece in pieces] == [12, MAX_PAYLOAD_BYTES, 13]
    assert pieces[1].obj is message


# --- both sides ----------------------------------------------------------------------


def test_bytes_and_ends_go_both_ways():
    wire = Wire()
    ours, theirs = wire.open()

    wire.dialler.queue(ours, b"question", 0.0)
    wire.dialler.close(ours, 0.0)
    wire.carry()
    assert wire.listener.read(theirs, 100) == b"question"
    assert theirs.peer_closed
    wire.listener.queue(theirs, b"answer", 0.0)
    wire.listener.close(theirs, 0.0)
    wire.carry()

    assert wire.dialler.read(ours, 100) == b"answer"
    assert wire.dialler.num_streams == wire.listener.num_streams == 0
    assert ours.is_forgotten
    assert theirs.is_forgotten
    assert not ours.problem


def test_an_end_follows_what_was_written():
    wire = Wire()
    ours, theirs = wire.open()
    size = 2 * INITIAL_WINDOW_BYTES

    wire.dialler.queue(ours, bytes(size), 0.0)
    wire.dialler.close(ours, 0.0)
    wire.carry()

    assert theirs.unread_bytes == size
    assert theirs.peer_closed


def test_a_stream_of_which_bytes_are_unread_is_open_until_they_are_read():
    wire = Wire()
    ours, theirs = wire.open()
    wire.dialler.queue(ours, b"last", 0.0)
    wire.dialler.close(ours, 0.0)
    wire.listener.close(theirs, 0.0)
    wire.carry()
    assert wire.listener.num_streams == 1

    assert wire.listener.read(theirs, 4) == b"last"
    assert wire.listener.num_streams == 0


def test_a_reset_ends_both_directions_of_one_stream():
    wire = Wire()
    ours, theirs = wire.open()
    others = wire.open()
    wire.dialler.queue(ours, bytes(WINDOW), 0.0)

    wire.listener.reset(theirs)
    wire.carry()

    assert ours.problem == "the peer reset it"
    assert theirs.problem
    assert not any(stream.problem for stream in others)
    assert wire.dialler.num_streams == 1


def test_nothing_can_be_read_after_a_reset_from_here():
    wire = Wire()
    ours, theirs = wire.open()
    wire.dialler.queue(ours, b"late", 0.0)
    wire.carry()

    wire.listener.reset(theirs)

    assert wire.listener.read(theirs, 100) == b""


def test_frames_of_a_stream_that_was_just_reset_are_passed_over():
    wire = Wire()
    ours, theirs = wire.open()
    wire.dialler.queue(ours, bytes(100), 0.0)
    wire.listener.reset(theirs)

    wire.carry()

    assert not wire.listener.problem
    assert not theirs.unread


def test_what_came_before_a_goodbye_can_still_be_read():
    wire = Wire()
    ours, theirs = wire.open()
    wire.listener.queue(theirs, b"goodbye", 0.0)
    wire.listener.next_batch(0, 0.0)
    sent = b"".join(wire.listener.next_batch(1000, 0.0))
    wire.listener.end("it is time")
    sent += output(wire.listener)

    wire.dialler.receive(sent, 0.0)

    assert problem(wire.dialler.take_events()) == "the peer left, with reason 0"
    assert wire.dialler.read(ours, 100) == b"goodbye"
    assert wire.dialler.read(ours, 100) == b""
    assert ours.problem


def test_nothing_that_came_can_be_read_after_an_end_from_here():
    wire = Wire()
    ours, theirs = wire.open()
    wire.dialler.queue(ours, b"late", 0.0)
    wire.carry()

    wire.listener.end("the member was removed")

    assert wire.listener.read(theirs, 100) == b""


def test_a_withdrawn_message_is_sent_whole_or_not_at_all():
    wire = Wire()
    ours, theirs = wire.open()
    data = bytearray(b"x" * (2 * INITIAL_WINDOW_BYTES))
    first = wire.dialler.queue(ours, data, 0.0)
    second = wire.dialler.queue(ours, b"never", 0.0)
    sent = output(wire.dialler)
    assert 0 < first.sent < len(data)

    wire.dialler.withdraw(ours, first)
    wire.dialler.withdraw(ours, second)
    data[:] = b"y" * len(data)  # the buffer is its owner's again
    wire.listener.receive(sent, 0.0)
    wire.carry()

    received = wire.listener.read(theirs, WINDOW)
    while part := wire.listener.read(theirs, WINDOW):
        received += part
    assert received == b"x" * len(data)


# --- fairness ------------------------------------------------------------------------


def test_a_short_message_goes_before_the_rest_of_a_long_one():
    wire = Wire()
    bulk, _ = wire.open()
    token, _ = wire.open()
    wire.dialler.queue(bulk, bytes(1 << 20), 0.0)
    wire.dialler.next_batch(1, 0.0)

    wire.dialler.queue(token, b"token", 0.0)

    assert headers(b"".join(wire.dialler.next_batch(1, 0.0))) == [(DATA, 0, token.stream_id, 5)]


def test_long_messages_take_turns():
    wire = Wire()
    streams = [wire.open()[0] for _ in range(3)]
    for stream in streams:
        wire.dialler.queue(stream, bytes(3 * MAX_PAYLOAD_BYTES), 0.0)

    order = [stream_id for _, _, stream_id, _ in headers(output(wire.dialler))]

    assert order == [1, 3, 5] * 3


def test_a_stream_that_stops_and_starts_does_not_go_first_for_ever():
    wire = Wire()
    eager, _ = wire.open()
    patient, _ = wire.open()
    wire.dialler.queue(patient, bytes(2 * MAX_PAYLOAD_BYTES), 0.0)
    wire.dialler.next_batch(1, 0.0)
    order = []
    for _ in range(3):
        wire.dialler.queue(eager, b"again", 0.0)
        batch = b"".join(wire.dialler.next_batch(1, 0.0))
        order += [stream_id for _, _, stream_id, _ in headers(batch)]

    assert order == [eager.stream_id, patient.stream_id, eager.stream_id]


def test_an_end_comes_once_and_after_the_last_of_many_messages():
    wire = Wire()
    ours, _ = wire.open()
    for _ in range(3):
        wire.dialler.queue(ours, b"part", 0.0)
    wire.dialler.close(ours, 0.0)
    wire.dialler.close(ours, 0.0)

    frames = [(kind, flags) for kind, flags, _, _ in headers(output(wire.dialler))]

    assert frames == [(DATA, 0)] * 3 + [(WINDOW_UPDATE, FIN)]


def test_a_full_batch_says_that_there_may_be_more():
    wire = Wire()
    ours, _ = wire.open()
    wire.dialler.queue(ours, bytes(2 * MAX_PAYLOAD_BYTES), 0.0)

    wire.dialler.next_batch(MAX_PAYLOAD_BYTES, 0.0)
    assert wire.dialler.has_more
    wire.dialler.next_batch(2 * MAX_PAYLOAD_BYTES, 0.0)
    assert not wire.dialler.has_more


# --- windows and budget --------------------------------------------------------------


def test_a_sender_stops_at_its_window_and_goes_on_when_it_is_read():
    wire = Wire(window_bytes=INITIAL_WINDOW_BYTES)
    ours, theirs = wire.open()
    message = wire.dialler.queue(ours, bytes(3 * INITIAL_WINDOW_BYTES), 0.0)
    wire.carry()
    assert theirs.unread_bytes == message.sent == INITIAL_WINDOW_BYTES

    wire.listener.read(theirs, INITIAL_WINDOW_BYTES // 2 - 1)
    wire.carry()
    assert message.sent == INITIAL_WINDOW_BYTES
    while wire.listener.read(theirs, WINDOW):
        wire.carry()

    assert message.is_sent


def test_a_window_grows_when_half_of_it_is_used():
    wire = Wire()
    ours, theirs = wire.open()
    wire.dialler.queue(ours, bytes(WINDOW + 1), 0.0)

    wire.carry()

    assert theirs.unread_bytes == WINDOW
    assert theirs.credit == 0


def test_the_windows_of_a_peer_together_stay_within_its_budget():
    wire = Wire(limit=1 << 20)
    pairs = [wire.open() for _ in range(4)]
    for ours, _ in pairs:
        wire.dialler.queue(ours, bytes(WINDOW), 0.0)
    wire.carry()
    assert sum(theirs.unread_bytes for _, theirs in pairs) == 1 << 20

    refused = wire.dialler.open(0.0)
    wire.carry()
    assert refused.problem == "the peer reset it"

    wire.listener.reset(pairs[0][1])
    wire.carry()
    assert not wire.dialler.open(0.0).problem


def test_a_window_returns_to_the_budget_with_its_stream():
    wire = Wire(limit=WINDOW)
    for _ in range(3):
        ours, theirs = wire.open()
        wire.dialler.queue(ours, bytes(WINDOW), 0.0)
        wire.carry()
        assert theirs.unread_bytes == WINDOW
        wire.dialler.reset(ours)
        wire.carry()


def test_no_window_is_opened_to_a_peer_that_has_closed_its_side():
    wire = Wire(window_bytes=INITIAL_WINDOW_BYTES)
    ours, theirs = wire.open()
    size = INITIAL_WINDOW_BYTES // 2 - 1
    wire.dialler.queue(ours, bytes(size), 0.0)
    wire.dialler.queue(ours, b"the last", 0.0)
    wire.dialler.close(ours, 0.0)
    wire.carry()

    while wire.listener.read(theirs, WINDOW):
        assert output(wire.listener) == b""


@pytest.mark.parametrize("length", [INITIAL_WINDOW_BYTES + 1, 1 << 31])
def test_more_than_a_window_costs_the_connection(length):
    mux = make_mux()
    mux.receive(frame(WINDOW_UPDATE, SYN, 1, 0), 0.0)

    mux.receive(frame(DATA, 0, 1, length), 0.0)

    assert problem(mux.take_events()) == "it sent more than its window"
    assert headers(output(mux)) == [(GO_AWAY, 0, 0, 1)]


def test_more_than_a_window_in_many_frames_costs_the_connection():
    mux = make_mux(window_bytes=INITIAL_WINDOW_BYTES)
    mux.receive(frame(WINDOW_UPDATE, SYN, 1, 0), 0.0)
    half = INITIAL_WINDOW_BYTES // 2
    for _ in range(2):
        mux.receive(frame(DATA, 0, 1, half, bytes(half)), 0.0)
    assert not mux.problem

    mux.receive(frame(DATA, 0, 1, 1, b"x"), 0.0)

    assert mux.problem == "it sent more than its window"


def test_streams_beyond_the_limit_are_refused_and_counted_until_they_end():
    mux = make_mux(max_inbound_streams=2)
    for stream_id in (1, 3, 5):
        mux.receive(frame(WINDOW_UPDATE, SYN, stream_id, 0), 0.0)
    assert len(opened(mux.take_events())) == 2
    assert output(mux) == frame(WINDOW_UPDATE, RST, 5, 0)

    mux.receive(frame(WINDOW_UPDATE, RST, 1, 0) + frame(WINDOW_UPDATE, SYN, 7, 0), 0.0)

    assert [stream.stream_id for stream in opened(mux.take_events())] == [7]


# --- violations ----------------------------------------------------------------------

OPEN = frame(WINDOW_UPDATE, SYN, 1, 0)


@pytest.mark.parametrize(
    "sent",
    [
        b"\x01" + bytes(11),
        frame(4, 0, 0, 0),
        frame(DATA, 16, 1, 0),
        frame(DATA, 0, 0, 1, b"x"),
        frame(WINDOW_UPDATE, 0, 1, 10),
        frame(DATA, FIN, 3, 0),
        frame(WINDOW_UPDATE, SYN, 2, 0),
        frame(WINDOW_UPDATE, SYN, 0, 0),
        OPEN + OPEN,
        frame(WINDOW_UPDATE, SYN, 5, 0) + frame(WINDOW_UPDATE, SYN, 3, 0),
        frame(PING, SYN, 1, 0),
        frame(GO_AWAY, 0, 1, 0),
        OPEN + frame(WINDOW_UPDATE, FIN, 1, 0) + frame(DATA, 0, 1, 1, b"x"),
        OPEN + frame(WINDOW_UPDATE, 0, 1, 0xFFFFFFFF),
        frame(PING, SYN, 0, 0) * (MAX_WAITING_CONTROL + 1),
    ],
    ids=[
        "version",
        "type",
        "flag",
        "stream 0",
        "window of no stream",
        "end of no stream",
        "our ids",
        "id 0",
        "id twice",
        "id that falls",
        "ping of a stream",
        "goodbye of a stream",
        "bytes after the end",
        "window overflow",
        "answers that are not read",
    ],
)
def test_what_yamux_forbids_ends_the_connection(sent):
    mux = make_mux()

    mux.receive(sent, 0.0)

    assert problem(mux.take_events())
    assert headers(output(mux)) == [(GO_AWAY, 0, 0, 1)]
    mux.receive(OPEN, 0.0)
    assert mux.take_events() == []


# --- time ----------------------------------------------------------------------------


def test_a_silent_peer_is_asked_and_then_given_up():
    mux = make_mux(is_initiator=True, ping_after_s=15, pong_s=10)
    mux.open(0.0)
    output(mux)
    assert mux.next_deadline() == 15
    mux.tick(14.9)
    assert output(mux) == b""

    mux.tick(15.0)
    assert output(mux) == frame(PING, SYN, 0, 1)
    assert mux.next_deadline() == 25
    mux.tick(25.0)

    assert problem(mux.take_events()) == "the peer is silent"


def test_any_byte_is_an_answer():
    mux = make_mux(is_initiator=True, ping_after_s=15, pong_s=10)
    mux.open(0.0)
    mux.tick(15.0)
    mux.receive(b"\x00", 16.0)

    mux.tick(25.0)

    assert not mux.problem
    assert mux.next_deadline() == 31


def test_a_connection_without_streams_is_closed():
    wire = Wire(idle_s=60, ping_after_s=1000)
    ours, _ = wire.open()
    wire.listener.tick(100.0)
    assert not wire.listener.problem
    wire.dialler.reset(ours)
    wire.carry(100.0)
    assert wire.listener.next_deadline() == 160

    wire.listener.tick(160.0)

    assert problem(wire.listener.take_events()) == "nothing used it"


def test_a_stream_that_takes_nothing_is_reset_alone():
    wire = Wire(write_s=10, ping_after_s=1000, window_bytes=INITIAL_WINDOW_BYTES)
    ours, _ = wire.open()
    other, _ = wire.open()
    wire.dialler.queue(ours, bytes(INITIAL_WINDOW_BYTES + 1), 0.0)
    wire.carry(2.0)
    assert wire.dialler.has_new_deadline
    assert wire.dialler.next_deadline() == 12
    wire.dialler.tick(11.9)
    assert not ours.problem

    wire.dialler.tick(12.0)

    assert ours.problem == "the peer took no bytes for 10 s"
    assert not other.problem
    assert not wire.dialler.problem


def test_a_stream_that_takes_some_of_its_bytes_is_not_reset():
    wire = Wire(write_s=10, ping_after_s=1000, window_bytes=INITIAL_WINDOW_BYTES)
    ours, theirs = wire.open()
    wire.dialler.queue(ours, bytes(1 << 20), 0.0)
    wire.carry(0.0)
    wire.listener.read(theirs, INITIAL_WINDOW_BYTES)
    while theirs.unread and theirs.unread_bytes > INITIAL_WINDOW_BYTES // 2:
        wire.listener.read(theirs, INITIAL_WINDOW_BYTES)
    wire.carry(9.0)

    wire.dialler.tick(10.0)

    assert not ours.problem


@pytest.mark.parametrize("way_out", ["a window", "a withdrawal"])
def test_a_stream_that_no_longer_waits_is_not_reset(way_out):
    wire = Wire(write_s=10, ping_after_s=1000)
    ours, theirs = wire.open()
    first = wire.dialler.queue(ours, bytes(INITIAL_WINDOW_BYTES), 0.0)
    output(wire.dialler)
    second = wire.dialler.queue(ours, b"stuck", 0.0)
    assert first.is_sent
    assert wire.dialler.next_deadline() == 10

    if way_out == "a window":
        wire.dialler.receive(frame(WINDOW_UPDATE, 0, theirs.stream_id, 5), 0.0)
        output(wire.dialler)
        assert second.is_sent
    else:
        wire.dialler.withdraw(ours, second)

    wire.dialler.tick(10.0)
    assert not ours.problem


def test_a_half_closed_stream_lives_while_something_comes_on_it():
    wire = Wire(half_closed_s=60, ping_after_s=1000)
    ours, theirs = wire.open()
    wire.listener.close(theirs, 5.0)
    wire.carry(5.0)
    wire.dialler.queue(ours, b"more", 30.0)
    wire.carry(30.0)

    wire.listener.tick(65.0)
    assert not theirs.problem
    assert wire.listener.next_deadline() == 90


def test_a_stream_that_only_this_side_closed_is_reset_in_the_end():
    wire = Wire(half_closed_s=60, ping_after_s=1000)
    ours, theirs = wire.open()
    wire.listener.close(theirs, 5.0)
    wire.carry(5.0)
    assert wire.listener.next_deadline() == 65

    wire.listener.tick(65.0)
    wire.carry(65.0)

    assert theirs.problem == "the peer left it half closed"
    assert ours.problem == "the peer reset it"


def test_events_say_whose_turn_it_is_to_look():
    wire = Wire()
    ours, theirs = wire.open()
    wire.listener.take_events()
    wire.dialler.queue(ours, b"x", 0.0).is_awaited = True

    wire.carry()

    assert wire.dialler.take_events() == [StreamChanged(ours)]
    assert wire.listener.take_events() == [StreamChanged(theirs)]


def test_a_message_that_nobody_waits_for_leaves_without_an_event():
    wire = Wire()
    ours, theirs = wire.open()
    wire.listener.take_events()
    wire.dialler.queue(ours, b"x", 0.0)

    wire.carry()

    assert wire.dialler.take_events() == []
    assert wire.listener.take_events() == [StreamChanged(theirs)]
