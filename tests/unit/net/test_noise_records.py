"""The record layer: its bytes, in any pieces, and whatever is done to them."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from hypothesis import given, settings
from hypothesis import strategies as st

from pals.net.noise_records import (
    MAX_PLAINTEXT_BYTES,
    OWN_RECORD_BYTES,
    RecordError,
    RecordOpener,
    RecordSealer,
)

KEY = bytes(range(32))


def seal(*pieces, number: int = 0) -> bytes:
    return b"".join(RecordSealer(KEY, number).seal(pieces))


def feed(opener: RecordOpener, data: bytes, cuts: list[int] | None = None) -> list[bytes]:
    """Give bytes to an opener in pieces, and return the plaintexts."""
    opened = []
    while data:
        size = min(cuts.pop() if cuts else len(data), len(opener.space), len(data))
        opener.space[:size] = data[:size]
        opened += opener.received(size)
        data = data[size:]
    return opened


def test_the_bytes_are_the_noise_protocol_s():
    """RFC 8439's cipher under the nonce of Noise, section 12.3; the bytes are libsodium's."""
    sealed = seal(b"abc", number=2)

    length, record = sealed[:2], sealed[2:]
    assert length == bytes([0, 19])
    assert record == ChaCha20Poly1305(KEY).encrypt(bytes(4) + b"\x02" + bytes(7), b"abc", None)
    assert sealed.hex() == "0013c8c19dc39be0b4fb7bd4d29f23f81487574df5"


def test_small_pieces_share_a_record_and_large_ones_do_not():
    large = bytes(OWN_RECORD_BYTES)

    opened = feed(RecordOpener(KEY), seal(b"a", b"b", large, b"c", b"d"))

    assert opened == [b"ab", large, b"cd"]


def test_pieces_are_split_where_a_record_is_full():
    pieces = [bytes(OWN_RECORD_BYTES - 1)] * 5 + [bytes(MAX_PLAINTEXT_BYTES + 1)]

    opened = feed(RecordOpener(KEY), seal(*pieces))

    small = OWN_RECORD_BYTES - 1
    sizes = [3 * small, 2 * small, MAX_PLAINTEXT_BYTES, 1]
    assert [len(plaintext) for plaintext in opened] == sizes


def test_nothing_makes_no_record():
    assert seal() == seal(b"", b"") == b""


@given(
    st.lists(st.binary(max_size=300), max_size=8),
    st.lists(st.integers(1, 700), max_size=50),
)
@settings(max_examples=100, deadline=None)
def test_bytes_arrive_whole_however_they_are_cut(pieces, cuts):
    sealer = RecordSealer(KEY)
    sealed = [record for piece in pieces for record in sealer.seal([piece])]

    opened = feed(RecordOpener(KEY), b"".join(sealed), cuts)

    assert opened == [piece for piece in pieces if piece]


@given(st.integers(0, 43), st.integers(1, 255))
def test_a_changed_byte_is_noticed_or_leaves_a_record_unfinished(position, flip):
    sealed = bytearray(seal(b"hello") + RecordSealer(KEY, 1).seal([b"world"])[0])
    sealed[position % len(sealed)] ^= flip

    opener = RecordOpener(KEY)
    try:
        opened = feed(opener, bytes(sealed))
    except RecordError:
        return
    assert opened in ([], [b"hello"])


@pytest.mark.parametrize("order", [[0, 0], [1], [1, 0], [0, 2]], ids=str)
def test_a_record_that_is_repeated_left_out_or_moved_does_not_open(order):
    sealer = RecordSealer(KEY)
    records = [sealer.seal([bytes([number])])[0] for number in range(3)]

    with pytest.raises(RecordError):
        feed(RecordOpener(KEY), b"".join(records[number] for number in order))


@given(st.binary(min_size=2, max_size=2000), st.lists(st.integers(1, 100), max_size=40))
def test_garbage_opens_to_nothing(data, cuts):
    opener = RecordOpener(KEY)
    try:
        opened = feed(opener, data, cuts)
    except RecordError:
        return
    assert opened == []


def test_there_is_always_room_for_more():
    opener = RecordOpener(KEY)
    record = seal(bytes(MAX_PLAINTEXT_BYTES))

    for _ in range(20):
        feed(opener, record[:-1])
        assert len(opener.space) > 100_000
        with pytest.raises(RecordError):
            feed(opener, b"\x00")
        opener = RecordOpener(KEY)
