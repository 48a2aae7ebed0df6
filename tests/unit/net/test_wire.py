from __future__ import annotations

import struct
import tracemalloc
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pals.errors import InvalidFrame
from pals.net import wire
from pals.net.wire import (
    CONTROL_SHAPE,
    FLAG_LAST,
    HEADER_BYTES,
    KEY_SHAPE,
    MAX_BODY_BYTES,
    MAX_CONTROL_BYTES,
    MAX_KEY_BYTES,
    MAX_ROW_TOKENS,
    MAX_ROWS,
    NO_ROWS,
    ROW_BYTES,
    Codec,
    FrameHead,
    FrameShape,
    Kind,
    Lane,
    LinkAddress,
    Row,
    Rows,
    WireDtype,
    check_header,
    check_rows,
    hidden_shape,
    pack_header,
    pack_rows,
    parse_body,
    pooled_shape,
    sampled_shape,
    scored_shape,
    tokens_shape,
)
from pals.types import PeerId, SessionId

PEER = PeerId("peer-a")
ADDRESS = LinkAddress(swarm=b"w" * 16, epoch=3, link=b"l" * 16)
MANIFEST = b"m" * 32
COUNTER = 9
WIDTH = 4
HIDDEN = hidden_shape(MANIFEST, 10, "bf16", WIDTH)
TOKENS = tokens_shape(MANIFEST)
SAMPLED = sampled_shape(MANIFEST, 30)
INT8 = replace(HIDDEN, codec=Codec.INT8)
WIDE = hidden_shape(MANIFEST, 10, "f32", 8192)
SCORED = scored_shape(MANIFEST, 30)
POOLED = pooled_shape(MANIFEST, 30, WIDTH)
SHAPES = [CONTROL_SHAPE, TOKENS, HIDDEN, SAMPLED, SCORED, POOLED]
ONE_ROW_BYTES = ROW_BYTES + HIDDEN.token_bytes


def session(number: int) -> SessionId:
    return SessionId(bytes([number]) * 16)


def header(
    shape: FrameShape = HIDDEN,
    *,
    lane: Lane = Lane.DECODE,
    rows: int = 1,
    body: int = ONE_ROW_BYTES,
    counter: int = COUNTER,
    address: LinkAddress = ADDRESS,
) -> bytes:
    return pack_header(address, lane, counter, shape, rows, body)


def check(data: bytes, *accepted: FrameShape, lane: Lane = Lane.DECODE) -> FrameHead:
    return check_header(
        data,
        peer=PEER,
        address=ADDRESS,
        lane=lane,
        counter=COUNTER,
        accepted=accepted or (HIDDEN,),
    )


def refusal(data: bytes, *accepted: FrameShape, lane: Lane = Lane.DECODE) -> str:
    with pytest.raises(InvalidFrame) as caught:
        check(data, *accepted, lane=lane)
    assert caught.value.fields["peer"] == PEER
    return str(caught.value.fields["problem"])


# --- header --------------------------------------------------------------------------


def test_header_has_the_documented_layout() -> None:
    wanted = b"".join(
        [
            b"PALS",
            bytes([3]),  # wire version
            bytes([1]),  # lane: decode
            bytes([2]),  # kind: hidden
            bytes([2]),  # dtype: bf16
            bytes([0]),  # codec: raw
            b"w" * 16,
            (3).to_bytes(8, "big"),
            b"l" * 16,
            (9).to_bytes(8, "big"),
            b"m" * 32,
            (10).to_bytes(2, "big"),
            (5).to_bytes(2, "big"),
            (77).to_bytes(4, "big"),
        ]
    )
    assert header(rows=5, body=77) == wanted
    assert len(wanted) == HEADER_BYTES


def test_numbers_of_the_wire_are_pinned() -> None:
    assert [(k.name, k.value) for k in Kind] == [
        ("CONTROL", 0),
        ("TOKENS", 1),
        ("HIDDEN", 2),
        ("SAMPLED", 3),
        ("KEY", 4),
        ("SCORED", 5),
        ("POOLED", 6),
    ]
    assert [(x.name, x.value) for x in Codec] == [("RAW", 0), ("INT8", 1)]
    assert [(x.name, x.value) for x in Lane] == [("CONTROL", 0), ("DECODE", 1), ("PREFILL", 2)]
    assert [(x.name, x.value) for x in WireDtype] == [
        ("NONE", 0),
        ("INT32", 1),
        ("BF16", 2),
        ("F32", 3),
    ]


@pytest.mark.parametrize(
    ("shape", "token_bytes", "boundary"),
    [
        (CONTROL_SHAPE, 0, 0),
        (TOKENS, 4, 0),
        (SAMPLED, 4, 30),
        (HIDDEN, 8, 10),
        (POOLED, 16, 30),
        (hidden_shape(MANIFEST, 10, "f32", WIDTH), 16, 10),
        (KEY_SHAPE, 0, 0),
        (INT8, 4 + 2, 10),
        (replace(INT8, width=64), 64 + 2 * 2, 10),
        (replace(INT8, width=65), 65 + 2 * 3, 10),
    ],
)
def test_shape_states_bytes_of_a_token_and_the_layer_it_enters(
    shape: FrameShape, token_bytes: int, boundary: int
) -> None:
    assert shape.token_bytes == token_bytes
    assert shape.boundary == boundary


@pytest.mark.parametrize("shape", SHAPES[1:])
def test_expected_header_gives_shape_and_sizes(shape: FrameShape) -> None:
    body = 2 * (ROW_BYTES + shape.token_bytes)
    assert check(header(shape, rows=2, body=body), *SHAPES) == FrameHead(shape, 2, body)


@pytest.mark.parametrize("bit", range(8))
@pytest.mark.parametrize("position", range(HEADER_BYTES - 6))
def test_flipped_bit_of_any_field_but_the_sizes_is_refused(position: int, bit: int) -> None:
    changed = bytearray(header())
    changed[position] ^= 1 << bit
    refusal(bytes(changed), HIDDEN)


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (b"\0" * HEADER_BYTES, "magic"),
        (header()[:4] + b"\2" + header()[5:], "version"),
        (header(lane=Lane.PREFILL), "lane"),
        (header()[:8] + b"\1" + header()[9:], "codec"),
        (header(address=LinkAddress(swarm=b"x" * 16, epoch=3, link=b"l" * 16)), "swarm"),
        (header(address=LinkAddress(swarm=b"w" * 16, epoch=4, link=b"l" * 16)), "epoch"),
        (header(address=LinkAddress(swarm=b"w" * 16, epoch=3, link=b"k" * 16)), "link"),
        (header(counter=COUNTER + 1), "counter"),
        (header(counter=COUNTER - 1), "counter"),
        (header(TOKENS), "kind"),
        (header(hidden_shape(MANIFEST, 10, "f32", WIDTH)), "dtype"),
        (header(INT8), "codec 1"),
        (header(hidden_shape(MANIFEST, 20, "bf16", WIDTH)), "boundary"),
        (header(hidden_shape(b"n" * 32, 10, "bf16", WIDTH)), "manifest"),
    ],
)
def test_refusal_names_what_differs(data: bytes, name: str) -> None:
    assert name in refusal(data, HIDDEN)


def test_nothing_is_accepted_where_no_shape_is() -> None:
    with pytest.raises(InvalidFrame):
        check_header(
            header(), peer=PEER, address=ADDRESS, lane=Lane.DECODE, counter=COUNTER, accepted=()
        )


# Each shape's smallest and largest possible body, and the next size out on both sides.
SIZES = [
    (CONTROL_SHAPE, 0, 1, MAX_CONTROL_BYTES),
    (TOKENS, 1, 28, 24 + 4 * 512),
    (TOKENS, 256, 256 * 28, 256 * (24 + 4 * 512)),
    (HIDDEN, 1, 32, 24 + 8 * 512),
    (HIDDEN, 3, 3 * 32, 3 * (24 + 8 * 512)),
    (WIDE, 256, 256 * (24 + 32768), 64 << 20),
    (KEY_SHAPE, 0, 1, MAX_KEY_BYTES),
    (INT8, 1, 24 + 6, 24 + 6 * 512),
    # What it decodes to is bounded as well: 2048 tokens of 32 KiB are 64 MiB.
    (replace(WIDE, codec=Codec.INT8), 256, 256 * (24 + 8704), 256 * 24 + 2048 * 8704),
]


@pytest.mark.parametrize(("shape", "rows", "lowest", "highest"), SIZES)
def test_body_sizes_that_the_rows_can_have_are_taken(
    shape: FrameShape, rows: int, lowest: int, highest: int
) -> None:
    for body in (lowest, highest):
        assert check(header(shape, rows=rows, body=body), shape).body_bytes == body


@pytest.mark.parametrize(("shape", "rows", "lowest", "highest"), SIZES)
def test_body_sizes_that_the_rows_cannot_have_are_refused(
    shape: FrameShape, rows: int, lowest: int, highest: int
) -> None:
    for body in (0, lowest - 1, highest + 1, 2**32 - 1):
        assert f"{body} bytes" in refusal(header(shape, rows=rows, body=body), shape)


@pytest.mark.parametrize(
    ("shape", "rows"),
    [
        (CONTROL_SHAPE, 1),
        (CONTROL_SHAPE, 65535),
        (KEY_SHAPE, 1),
        (HIDDEN, 0),
        (HIDDEN, 257),
        (TOKENS, 65535),
    ],
)
def test_row_counts_that_no_frame_has_are_refused(shape: FrameShape, rows: int) -> None:
    body = max(1, rows * (ROW_BYTES + shape.token_bytes))
    assert f"{rows} rows" in refusal(header(shape, rows=rows, body=body), shape)


def test_limits_are_the_documented_ones() -> None:
    limits = (MAX_ROWS, MAX_ROW_TOKENS, MAX_BODY_BYTES, MAX_CONTROL_BYTES, MAX_KEY_BYTES)
    assert limits == (256, 512, 64 << 20, 1 << 20, 256)


def test_huge_claims_are_refused_without_allocating() -> None:
    claims = [header(HIDDEN, rows=65535, body=2**32 - 1), header(HIDDEN, rows=1, body=2**32 - 1)]
    refusal(claims[0])
    tracemalloc.start()
    try:
        for data in claims:
            refusal(data)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 100_000


@given(st.binary(min_size=HEADER_BYTES, max_size=HEADER_BYTES))
def test_arbitrary_headers_raise_nothing_but_invalid_frame(data: bytes) -> None:
    with pytest.raises(InvalidFrame):
        check(data, *SHAPES)


# --- body ----------------------------------------------------------------------------


def parse(shape: FrameShape, rows: list[Row], payload: bytes) -> wire.Frame:
    body = pack_rows(Rows.of(*rows)) + payload
    return parse_body(PEER, Lane.DECODE, FrameHead(shape, len(rows), len(body)), body)


def test_row_has_the_documented_layout() -> None:
    row = Row(session(1), 258, 3, FLAG_LAST)
    assert pack_rows(Rows.of(row)) == bytes([1]) * 16 + struct.pack(">IHH", 258, 3, 1)
    assert len(pack_rows(Rows.of(row))) == ROW_BYTES


@given(
    st.lists(
        st.tuples(st.integers(0, 2**32 - 1), st.integers(1, 5), st.integers(0, 1)),
        min_size=1,
        max_size=6,
    )
)
def test_body_gives_its_rows_and_payload_back(parts: list[tuple[int, int, int]]) -> None:
    rows = [Row(session(i), *part) for i, part in enumerate(parts)]
    payload = bytes(range(sum(r.num_tokens for r in rows))) * HIDDEN.token_bytes
    frame = parse(HIDDEN, rows, payload)
    assert (frame.lane, frame.shape, frame.rows) == (Lane.DECODE, HIDDEN, Rows.of(*rows))
    assert bytes(frame.payload) == payload


def test_control_body_is_all_payload() -> None:
    frame = parse(CONTROL_SHAPE, [], b"anything")
    assert frame.rows == NO_ROWS
    assert bytes(frame.payload) == b"anything"


@pytest.mark.parametrize("missing", [-1, 1, 8])
def test_payload_that_is_not_that_of_the_rows_is_refused(missing: int) -> None:
    rows = [Row(session(1), 0, 2), Row(session(2), 5, 1)]
    with pytest.raises(InvalidFrame):
        parse(HIDDEN, rows, bytes(3 * HIDDEN.token_bytes - missing))


def test_two_rows_of_one_session_are_refused() -> None:
    rows = [Row(session(1), 0, 1), Row(session(2), 0, 1), Row(session(1), 1, 1)]
    with pytest.raises(InvalidFrame) as caught:
        parse(HIDDEN, rows, bytes(3 * HIDDEN.token_bytes))
    assert caught.value.fields["problem"] == "two rows of one session"


@pytest.mark.parametrize("tokens", [0, 513, 65535])
def test_row_of_an_impossible_length_is_refused(tokens: int) -> None:
    # The other row makes the payload add up, so that the length itself is what is wrong.
    rows = [Row(session(1), 0, tokens), Row(session(2), 0, 1)]
    with pytest.raises(InvalidFrame) as caught:
        parse(HIDDEN, rows, bytes((tokens + 1) * HIDDEN.token_bytes))
    assert f"{tokens} tokens" in str(caught.value)


@pytest.mark.parametrize("flags", [2, 3, 0x8000, 0xFFFF])
def test_unknown_flags_are_refused(flags: int) -> None:
    with pytest.raises(InvalidFrame):
        parse(HIDDEN, [Row(session(1), 0, 1, flags)], bytes(HIDDEN.token_bytes))


def test_longest_row_is_taken() -> None:
    rows = Rows.of(Row(session(1), 0, MAX_ROW_TOKENS, FLAG_LAST))
    check_rows(PEER, HIDDEN, rows, MAX_ROW_TOKENS * HIDDEN.token_bytes)


@given(st.sampled_from([TOKENS, HIDDEN]), st.integers(1, 4), st.binary(max_size=40), st.data())
def test_arbitrary_bodies_raise_nothing_but_invalid_frame(
    shape: FrameShape, rows: int, payload: bytes, data: st.DataObject
) -> None:
    lengths = data.draw(st.lists(st.integers(0, 3), min_size=rows, max_size=rows))
    sessions = data.draw(st.lists(st.integers(0, 9), min_size=rows, max_size=rows))
    table = [Row(session(s), 0, n) for s, n in zip(sessions, lengths, strict=True)]
    adds_up = len(payload) == sum(lengths) * shape.token_bytes
    possible = adds_up and 0 not in lengths and len(set(sessions)) == rows
    try:
        frame = parse(shape, table, payload)
    except InvalidFrame:
        assert not possible
    else:
        assert possible
        assert bytes(frame.payload) == payload
