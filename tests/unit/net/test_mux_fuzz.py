"""The muxer's core under arbitrary cuts, arbitrary use and arbitrary bytes."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from pals.net.mux_frames import DATA, HEADER, RST, SYN, WINDOW_UPDATE
from tests.unit.net.muxes import Wire, frame, make_mux, opened, output

KNOWN_KINDS = st.integers(0, 4)
SIZES = st.sampled_from([0, 1, 5, 255, 256 << 10, (256 << 10) + 1, 4 << 20, 1 << 31])

frames = st.builds(
    lambda kind, flags, stream_id, length, body: (
        HEADER.pack(0, kind, flags, stream_id, length) + body[:length]
    ),
    KNOWN_KINDS,
    st.integers(0, 31),
    st.integers(0, 9),
    SIZES,
    st.binary(max_size=300),
)
attacks = st.lists(frames | st.binary(max_size=40), max_size=30)


def feed(mux, data: bytes, cuts: list[int]) -> None:
    while data:
        size = cuts.pop() if cuts else len(data)
        mux.receive(data[:size], 0.0)
        data = data[size:]


@given(attacks, st.lists(st.integers(1, 50), max_size=40), st.booleans())
@settings(max_examples=300, deadline=None)
def test_whatever_a_peer_sends_nothing_raises_and_little_is_kept(sent, cuts, is_initiator):
    mux = make_mux(is_initiator=is_initiator, max_inbound_streams=4)
    ours = mux.open(0.0)

    feed(mux, b"".join(sent), cuts)

    states = [ours, *opened(mux.take_events())]
    assert mux.num_streams <= 5
    assert sum(s.unread_bytes for s in states) <= len(b"".join(sent))
    assert all(s.unread_bytes == sum(map(len, s.unread)) for s in states)
    assert all(s.credit >= 0 for s in states)
    output(mux)
    mux.tick(1000.0)
    output(mux)


@given(attacks, st.lists(st.integers(1, 50), max_size=40))
@settings(max_examples=200, deadline=None)
def test_cuts_do_not_change_what_happens(sent, cuts):
    whole, cut = make_mux(), make_mux()
    data = b"".join(sent)

    whole.receive(data, 0.0)
    feed(cut, data, cuts)

    assert whole.problem == cut.problem
    contents = [
        [(s.stream_id, s.problem, s.peer_closed, b"".join(s.unread)) for s in opened(events)]
        for events in (whole.take_events(), cut.take_events())
    ]
    assert contents[0] == contents[1]
    assert output(whole) == output(cut)


steps = st.lists(
    st.tuples(
        st.sampled_from(["write", "write", "write", "read", "close", "reset", "open", "withdraw"]),
        st.integers(0, 5),
        st.sampled_from([1, 100, 20_000, 70_000, 300_000]),
    ),
    max_size=40,
)


@given(steps, st.lists(st.integers(1, 100_000), max_size=60))
@settings(max_examples=100, deadline=None)
def test_every_stream_carries_what_was_written_in_order(script, cuts):
    wire = Wire(window_bytes=512 << 10)
    pairs = [wire.open()]
    written, received, messages = [b""], [b""], [None]
    for number, (step, which, size) in enumerate(script):
        index = which % len(pairs)
        ours, theirs = pairs[index]
        if step == "open" and len(pairs) < 6:
            pairs.append(wire.open())
            written, received, messages = [*written, b""], [*received, b""], [*messages, None]
        elif step == "write" and not (ours.problem or ours.is_closing):
            data = bytes([number]) * size
            messages[index] = wire.dialler.queue(ours, data, 0.0)
            written[index] += data
        elif step == "withdraw" and (message := messages[index]) is not None:
            if not message.sent and message in ours.outbox and message is ours.outbox[-1]:
                written[index] = written[index][: -len(message.data)]
                wire.dialler.withdraw(ours, message)
        elif step == "close":
            wire.dialler.close(ours, 0.0)
        elif step == "reset":
            wire.listener.reset(theirs)
        sent = output(wire.dialler)
        feed(wire.listener, sent, cuts)
        if step == "read":
            received[index] += wire.listener.read(theirs, size)
        wire.dialler.receive(output(wire.listener), 0.0)

    wire.carry()
    for index, (ours, theirs) in enumerate(pairs):
        while part := wire.listener.read(theirs, 100_000):
            received[index] += part
            wire.carry()
        assert written[index].startswith(received[index])
        if not theirs.problem:
            assert received[index] == written[index]
            assert theirs.peer_closed == ours.is_closing
    assert not wire.dialler.problem
    assert not wire.listener.problem


def test_a_flood_of_opens_and_resets_keeps_nothing():
    mux = make_mux(max_inbound_streams=4)
    for stream_id in range(1, 20_001, 2):
        mux.receive(
            frame(WINDOW_UPDATE, SYN, stream_id, 0)
            + frame(DATA, 0, stream_id, 100, bytes(100))
            + frame(WINDOW_UPDATE, RST, stream_id, 0),
            0.0,
        )
        mux.take_events()
        output(mux)

    assert mux.num_streams == 0
    assert not mux.problem
