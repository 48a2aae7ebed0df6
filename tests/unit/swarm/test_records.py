from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pals.errors import InvalidRecord
from pals.swarm.records import (
    MAX_RECORD_BYTES,
    Genesis,
    InviteCertificate,
    Join,
    decode_entry,
    decode_record,
    encode,
    kind_of,
)
from tests.unit.swarm.chains import Chain, identity, record_of

CHAIN = Chain()
JOIN = CHAIN.add_peer(identity(3))
RECORDS = [record_of(entry) for entry in CHAIN.entries]
RECORDS.append(CHAIN.remove(identity(3), joined=bytes(32)))


def test_every_kind_survives_the_encoding() -> None:
    decoded = [decode_record(record) for record in RECORDS]
    assert [kind_of(record) for record in decoded] == ["genesis", "invite", "join", "remove"]
    assert [encode(record) for record in decoded] == RECORDS


@given(st.binary(max_size=300))
def test_arbitrary_bytes_are_refused_as_invalid(data: bytes) -> None:
    for decode in (decode_record, decode_entry):
        with pytest.raises(InvalidRecord):
            decode(data)


@given(st.sampled_from(RECORDS + CHAIN.entries), st.data())
def test_damaged_bytes_decode_canonically_or_not_at_all(valid: bytes, data: st.DataObject) -> None:
    damaged = bytearray(valid)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    for decode in (decode_record, decode_entry):
        try:
            value = decode(bytes(damaged))
        except InvalidRecord:
            continue
        assert encode(value) == bytes(damaged)


@pytest.mark.parametrize("record", RECORDS, ids=["genesis", "invite", "join", "remove"])
def test_truncated_or_lengthened_record_is_refused(record: bytes) -> None:
    for damaged in (record[:-1], record + b"\0", record[1:]):
        with pytest.raises(InvalidRecord):
            decode_record(damaged)


def test_second_encoding_of_a_record_is_refused() -> None:
    fields = msgspec.msgpack.decode(JOIN)
    # bin16 headers where bin8 would do: the same values, other bytes.
    longer = JOIN.replace(b"\xc4\x20", b"\xc5\x00\x20", 1)
    assert msgspec.msgpack.decode(longer) == fields
    with pytest.raises(InvalidRecord, match="canonical"):
        decode_record(longer)


def test_oversized_record_is_refused_unread() -> None:
    with pytest.raises(InvalidRecord, match=str(MAX_RECORD_BYTES)):
        decode_record(b"\x91" * (MAX_RECORD_BYTES + 1))


def test_deep_nesting_is_refused() -> None:
    with pytest.raises(InvalidRecord):
        decode_record(b"\x91" * MAX_RECORD_BYTES)


def test_terminal_escapes_in_a_name_are_refused() -> None:
    genesis = decode_record(CHAIN.genesis)
    assert isinstance(genesis, Genesis)
    with pytest.raises(InvalidRecord, match="control"):
        decode_record(encode(msgspec.structs.replace(genesis, name="\x1b[2Jhome")))


@pytest.mark.parametrize("max_uses", [0, -1, 10_001])
def test_impossible_number_of_uses_is_refused(max_uses: int) -> None:
    certificate = decode_record(RECORDS[1])
    assert isinstance(certificate, InviteCertificate)
    with pytest.raises(InvalidRecord):
        decode_record(encode(msgspec.structs.replace(certificate, max_uses=max_uses)))


def test_short_key_is_refused() -> None:
    join = decode_record(JOIN)
    assert isinstance(join, Join)
    with pytest.raises(InvalidRecord):
        decode_record(encode(msgspec.structs.replace(join, peer=b"short")))
