"""The lanes of a link, and every attack on them."""

from __future__ import annotations

import tracemalloc
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pals.errors import FrameKeyExhausted, InvalidFrame
from pals.net.handshake import LinkKeys
from pals.net.lanes import LaneReceiver, LaneSender
from pals.net.wire import (
    CONTROL_SHAPE,
    HEADER_BYTES,
    NO_ROWS,
    ROW_BYTES,
    Frame,
    FrameShape,
    Lane,
    Outgoing,
    Row,
    Rows,
    hidden_shape,
    pack_header,
    tokens_shape,
)
from pals.swarm import keys as swarm_keys
from pals.swarm.keys import TAG_BYTES, FrameKey
from pals.types import PeerId, SessionId, SwarmId
from tests.unit.net.handshakes import (
    EPOCH,
    INITIATOR,
    RESPONDER,
    SECRET,
    SWARM,
    A,
    B,
    C,
    link_keys,
    make_secrets,
    make_side,
)

MANIFEST = b"m" * 32
WIDTH = 4
HIDDEN = hidden_shape(MANIFEST, 10, "bf16", WIDTH)
TOKENS = tokens_shape(MANIFEST)
SESSION = SessionId(b"s" * 16)


def make_frame(tokens: Sequence[int] = (1,), *, shape: FrameShape = HIDDEN) -> Outgoing:
    """Return a frame with a row of each length."""
    rows = Rows.of(*(Row(SessionId(bytes([i]) * 16), 0, n) for i, n in enumerate(tokens)))
    return Outgoing(shape, rows, (bytes(i % 251 for i in range(sum(tokens) * shape.token_bytes)),))


def seal(keys: LinkKeys = INITIATOR, lane: Lane = Lane.DECODE, count: int = 1) -> list[bytes]:
    """Return the first frames that one end of a link writes on a lane."""
    sender = LaneSender(keys, lane)
    return [bytes(sender.seal(make_frame((1 + i % 3,)))) for i in range(count)]


FRAME = seal()[0]


def opened(receiver: LaneReceiver, data: bytes) -> list[Frame]:
    return list(receiver.receive(data, (HIDDEN,)))


def receiver_of(keys: LinkKeys = RESPONDER, lane: Lane = Lane.DECODE) -> LaneReceiver:
    return LaneReceiver(keys, lane)


@pytest.mark.parametrize("lane", list(Lane))
@pytest.mark.parametrize("forward", [True, False])
def test_frames_open_in_order_in_both_directions(lane: Lane, forward: bool) -> None:
    ends = (INITIATOR, RESPONDER) if forward else (RESPONDER, INITIATOR)
    sender, receiver = LaneSender(ends[0], lane), LaneReceiver(ends[1], lane)
    for tokens in ((1,), (2, 1), (5,)):
        outgoing = make_frame(tokens)
        [frame] = opened(receiver, sender.seal(outgoing))
        assert frame.lane is lane
        assert frame.rows == outgoing.rows
        assert bytes(frame.payload) == b"".join(outgoing.payload)


def test_control_frames_open() -> None:
    sealed = LaneSender(INITIATOR, Lane.CONTROL).seal(
        Outgoing(CONTROL_SHAPE, NO_ROWS, (b"message",))
    )
    [frame] = receiver_of(lane=Lane.CONTROL).receive(sealed, (CONTROL_SHAPE,))
    assert bytes(frame.payload) == b"message"


def test_frame_shows_nothing_of_its_body() -> None:
    outgoing = make_frame((4,))
    [payload] = outgoing.payload
    sealed = LaneSender(INITIATOR, Lane.DECODE).seal(outgoing)
    assert len(sealed) == HEADER_BYTES + ROW_BYTES + len(payload) + TAG_BYTES
    assert bytes(payload) not in sealed
    assert bytes(16) not in sealed[HEADER_BYTES:]


@given(st.lists(st.integers(1, 400), max_size=30), st.integers(1, 5))
def test_bytes_cut_anywhere_give_the_same_frames(cuts: list[int], count: int) -> None:
    stream = b"".join(seal(count=count))
    whole = opened(receiver_of(), stream)
    receiver, pieces, start = receiver_of(), [], 0
    for cut in [*cuts, len(stream)]:
        pieces += opened(receiver, stream[start : start + cut])
        start += cut
    assert len(pieces) == count
    assert [(f.rows, bytes(f.payload)) for f in pieces] == [
        (f.rows, bytes(f.payload)) for f in whole
    ]


def test_single_bytes_give_each_frame_as_soon_as_it_is_whole() -> None:
    frames = seal(count=3)
    receiver = receiver_of()
    ends = []
    for number, byte in enumerate(b"".join(frames), start=1):
        if opened(receiver, bytes([byte])):
            ends.append(number)
    assert ends == [sum(map(len, frames[: i + 1])) for i in range(3)]


# --- attacks on lanes ----------------------------------------------------------------


def sender_keys(
    local: PeerId = A,
    *,
    nonce: bytes | None = None,
    swarm: SwarmId = SWARM,
    epoch: int = EPOCH,
    secret: bytes = SECRET,
) -> LinkKeys:
    """Return the initiator's keys of a link to B that differs from the usual one."""
    ours, theirs = (make_secrets(p, swarm=swarm, epoch=epoch, secret=secret) for p in (local, B))
    initiator = make_side("initiator", secrets=ours, nonce=nonce)
    return link_keys(initiator, make_side("responder", secrets=theirs, remote=local))[0]


FOREIGN = {
    "replayed by the receiver to its sender": (INITIATOR, seal(INITIATOR)[0]),
    "written by the receiver itself": (RESPONDER, seal(RESPONDER)[0]),
    "of another lane": (RESPONDER, seal(INITIATOR, Lane.PREFILL)[0]),
    "ahead of its turn": (RESPONDER, seal(count=2)[1]),
    "of another link of the same peers": (RESPONDER, seal(sender_keys(nonce=b"n" * 16))[0]),
    "of another epoch with the same secret": (RESPONDER, seal(sender_keys(epoch=EPOCH + 1))[0]),
    "of another secret": (RESPONDER, seal(sender_keys(secret=b"x" * 32))[0]),
    "of another swarm": (RESPONDER, seal(sender_keys(swarm=SwarmId(b"o" * 32)))[0]),
    "of another peer": (RESPONDER, seal(sender_keys(C))[0]),
}
"""Who receives it, and a genuine frame that is not the next one of its lane."""


def expected_header(keys: LinkKeys, frame: bytes, counter: int = 0) -> bytes:
    """Return the header that the receiver expects, with the sizes of ``frame``."""
    body = len(frame) - HEADER_BYTES - TAG_BYTES
    return pack_header(keys.address, Lane.DECODE, counter, HIDDEN, 1, body)


@pytest.mark.parametrize("origin", FOREIGN)
def test_frame_from_elsewhere_is_refused(origin: str) -> None:
    keys, frame = FOREIGN[origin]
    with pytest.raises(InvalidFrame):
        opened(receiver_of(keys), frame)


@pytest.mark.parametrize("origin", FOREIGN)
def test_body_from_elsewhere_under_the_expected_header_is_refused(origin: str) -> None:
    keys, frame = FOREIGN[origin]
    with pytest.raises(InvalidFrame) as caught:
        opened(receiver_of(keys), expected_header(keys, frame) + frame[HEADER_BYTES:])
    assert caught.value.fields == {"peer": keys.remote, "problem": "frame 0 does not open"}


def test_replay_is_refused() -> None:
    for again in (FRAME, expected_header(RESPONDER, FRAME, 1) + FRAME[HEADER_BYTES:]):
        receiver = receiver_of()
        assert len(opened(receiver, FRAME)) == 1
        with pytest.raises(InvalidFrame):
            opened(receiver, again)


def test_reordered_frames_are_refused() -> None:
    first, second, third = seal(count=3)
    receiver = receiver_of()
    opened(receiver, first)
    with pytest.raises(InvalidFrame):
        opened(receiver, third + second)


def test_every_flipped_header_bit_is_refused() -> None:
    following = seal(count=2)[1]
    for bit in range(8 * HEADER_BYTES):
        changed = bytearray(FRAME)
        changed[bit // 8] ^= 1 << bit % 8
        receiver = receiver_of()
        # A longer claim waits for more bytes, which then do not open.
        with pytest.raises(InvalidFrame):
            opened(receiver, bytes(changed) + following * 200)


@pytest.mark.parametrize("position", range(HEADER_BYTES - 6))
def test_field_that_is_not_expected_is_refused_from_the_header_alone(
    position: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decrypt(self: FrameKey, header: bytes, sealed: bytes) -> bytes:
        raise AssertionError("a key was tried")

    monkeypatch.setattr(FrameKey, "open", decrypt)
    changed = bytearray(FRAME[:HEADER_BYTES])
    changed[position] ^= 1
    with pytest.raises(InvalidFrame):
        opened(receiver_of(), bytes(changed))
    with pytest.raises(InvalidFrame):
        opened(receiver_of(), bytes(changed) + FRAME[HEADER_BYTES:])


def test_every_flipped_bit_of_the_sealed_body_is_refused() -> None:
    for bit in range(8 * HEADER_BYTES, 8 * len(FRAME)):
        changed = bytearray(FRAME)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(InvalidFrame):
            opened(receiver_of(), bytes(changed))


@pytest.mark.parametrize("missing", [1, TAG_BYTES, len(FRAME) - HEADER_BYTES, len(FRAME) - 1])
def test_truncated_frame_is_never_given_out(missing: int) -> None:
    receiver = receiver_of()
    assert opened(receiver, FRAME[:-missing]) == []
    with pytest.raises(InvalidFrame):
        opened(receiver, seal(count=2)[1])


@pytest.mark.parametrize(
    ("rows", "body"), [(1, 2**32 - 1), (65535, 2**32 - 1), (65535, 65535 * 32), (0, 0)]
)
def test_claim_of_a_huge_frame_is_refused_from_the_header_alone(rows: int, body: int) -> None:
    header = pack_header(RESPONDER.address, Lane.DECODE, 0, HIDDEN, rows, body)
    receivers = [receiver_of(), receiver_of()]
    with pytest.raises(InvalidFrame):
        opened(receivers[0], header)
    tracemalloc.start()
    try:
        with pytest.raises(InvalidFrame):
            opened(receivers[1], header)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 100_000


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param(hidden_shape(b"n" * 32, 10, "bf16", WIDTH), id="manifest"),
        pytest.param(hidden_shape(MANIFEST, 11, "bf16", WIDTH), id="boundary"),
        pytest.param(hidden_shape(MANIFEST, 10, "f32", WIDTH), id="dtype"),
        pytest.param(TOKENS, id="kind"),
        pytest.param(CONTROL_SHAPE, id="control on a data lane"),
    ],
)
def test_member_that_sends_what_is_not_served_is_refused(shape: FrameShape) -> None:
    control = Outgoing(CONTROL_SHAPE, NO_ROWS, (b"x",))
    outgoing = control if shape is CONTROL_SHAPE else make_frame((1,), shape=shape)
    sealed = LaneSender(INITIATOR, Lane.DECODE).seal(outgoing)
    with pytest.raises(InvalidFrame):
        opened(receiver_of(), sealed)


SAME_SESSION = Outgoing(
    HIDDEN, Rows.of(Row(SESSION, 0, 1), Row(SESSION, 1, 1)), (bytes(2 * HIDDEN.token_bytes),)
)
WRONG_WIDTH = Outgoing(HIDDEN, Rows.of(Row(SESSION, 0, 1)), (bytes(HIDDEN.token_bytes + 1),))


@pytest.mark.parametrize("outgoing", [SAME_SESSION, WRONG_WIDTH])
def test_member_that_seals_an_impossible_body_is_refused(outgoing: Outgoing) -> None:
    with pytest.raises(InvalidFrame):
        opened(receiver_of(), LaneSender(INITIATOR, Lane.DECODE).seal(outgoing))


@pytest.mark.parametrize("fault", ["header", "body", "rows"])
def test_lane_is_dead_after_the_first_invalid_frame(fault: str) -> None:
    sender = LaneSender(INITIATOR, Lane.DECODE)
    first = bytearray(sender.seal(SAME_SESSION if fault == "rows" else make_frame()))
    second = bytes(sender.seal(make_frame()))
    if fault != "rows":
        first[0 if fault == "header" else -1] ^= 1
    receiver = receiver_of()
    with pytest.raises(InvalidFrame):
        opened(receiver, bytes(first))
    for data in (b"", FRAME, second):
        with pytest.raises(InvalidFrame):
            opened(receiver, data)


def test_no_nonce_repeats_within_a_lane() -> None:
    sender = LaneSender(INITIATOR, Lane.DECODE)
    sealed = [bytes(sender.seal(make_frame())[HEADER_BYTES:]) for _ in range(50)]
    assert len(set(sealed)) == 50


def test_sender_stops_at_the_limit_of_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swarm_keys, "FRAME_LIMIT", 2)
    sender = LaneSender(INITIATOR, Lane.DECODE)
    for _ in range(2):
        sender.seal(make_frame())
    with pytest.raises(FrameKeyExhausted):
        sender.seal(make_frame())


@given(st.integers(0, len(FRAME)), st.binary(min_size=1, max_size=300))
def test_arbitrary_bytes_raise_nothing_but_invalid_frame(genuine: int, noise: bytes) -> None:
    data = FRAME[:genuine] + noise
    try:
        frames = opened(receiver_of(), data)
    except InvalidFrame:
        frames = []
    assert len(frames) == 0 or data.startswith(FRAME)
