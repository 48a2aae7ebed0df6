from __future__ import annotations

from typing import get_args

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pals.errors import InvalidRecord
from pals.swarm.calls import (
    MAX_CALL_BYTES,
    AppendCall,
    Done,
    EntryAnswer,
    Failed,
    HintsAnswer,
    HintsCall,
    Joined,
    KeyAnswer,
    KeyCall,
    NotJoined,
    PutHintCall,
    RecordsAnswer,
    RecordsCall,
    RedeemCall,
    append_proof,
    append_request,
    decode_answer,
    decode_call,
    decode_redeem_answer,
    decode_redeem_call,
    encode_message,
)
from pals.swarm.requests import open_request
from pals.swarm.roster import MAX_ENTRIES
from pals.types import SwarmId
from tests.unit.swarm.chains import NOW, identity

SWARM = SwarmId(b"s" * 32)
CALLS = [
    KeyCall(),
    AppendCall(swarm_id=SWARM, record=b"record", proof="proof"),
    RecordsCall(swarm_id=SWARM, etag="tag"),
    PutHintCall(swarm_id=SWARM, hint=b"hint"),
    HintsCall(swarm_id=SWARM),
]
ANSWERS = [
    KeyAnswer(key=b"k" * 32),
    EntryAnswer(entry=b"entry"),
    RecordsAnswer(etag="tag", freshness=b"word", entries=(b"entry",)),
    RecordsAnswer(etag="tag", freshness=b"word"),
    HintsAnswer(hints=(b"hint",)),
    Done(),
    Failed(status=404, code="PALS-SWARM-UNKNOWN", problem="none"),
]
REDEEM = RedeemCall(swarm_id=SWARM, auth=b"a" * 32, join=b"join")
DECODERS = [decode_call, decode_answer, decode_redeem_call, decode_redeem_answer]


@pytest.mark.parametrize("call", CALLS)
def test_a_call_is_read_as_it_was_written(call):
    assert decode_call(encode_message(call)) == call


@pytest.mark.parametrize("answer", ANSWERS)
def test_an_answer_is_read_as_it_was_written(answer):
    assert decode_answer(encode_message(answer)) == answer


def test_a_redemption_is_read_as_it_was_written():
    joined = Joined(entry=b"e", entries=(b"e",), freshness=b"", hints=())
    assert decode_redeem_call(encode_message(REDEEM)) == REDEEM
    assert decode_redeem_answer(encode_message(joined)) == joined
    for reason in get_args(NotJoined.__annotations__["reason"]) or ("refused", "busy", "full"):
        refused = NotJoined(reason=reason)
        assert decode_redeem_answer(encode_message(refused)) == refused


def test_a_stranger_s_call_is_none_of_the_members_and_the_other_way_round():
    with pytest.raises(InvalidRecord):
        decode_call(encode_message(REDEEM))
    for call in CALLS:
        with pytest.raises(InvalidRecord):
            decode_redeem_call(encode_message(call))


@pytest.mark.parametrize(
    "call",
    [
        {"type": "RedeemCall", "swarm_id": b"s" * 31, "auth": b"a" * 32, "join": b""},
        {"type": "RedeemCall", "swarm_id": SWARM, "auth": b"a" * 33, "join": b""},
        {"type": "RedeemCall", "swarm_id": SWARM, "auth": b"a" * 32, "join": bytes(5000)},
        {"type": "RedeemCall", "swarm_id": SWARM, "auth": b"a" * 32, "join": b"", "more": 1},
        {"type": "RedeemCall", "swarm_id": SWARM},
    ],
)
def test_a_part_of_the_wrong_size_or_that_nobody_knows_is_refused(call):
    with pytest.raises(InvalidRecord):
        decode_redeem_call(msgspec.msgpack.encode(call))


def test_what_is_too_long_is_refused_before_it_is_read():
    with pytest.raises(InvalidRecord, match="longer than"):
        decode_call(bytes(MAX_CALL_BYTES + 1))
    entries = tuple(b"" for _ in range(MAX_ENTRIES + 1))
    with pytest.raises(InvalidRecord):
        decode_answer(encode_message(RecordsAnswer(etag="", freshness=b"", entries=entries)))


def test_an_error_quotes_nothing_of_the_call():
    damaged = encode_message(REDEEM).replace(b"auth", b"hath")
    with pytest.raises(InvalidRecord) as caught:
        decode_redeem_call(damaged)
    assert "hath" not in str(caught.value)
    assert "aaaa" not in str(caught.value)


@given(st.binary(max_size=300))
def test_bytes_of_any_kind_are_read_or_refused(data):
    for decode in DECODERS:
        try:
            decode(data)
        except InvalidRecord:
            continue


def test_the_proof_of_an_append_is_that_of_the_same_request_over_http():
    signer = identity(1)
    proof = append_proof(signer, SWARM, b"record", at=NOW)
    method, path, body = append_request(SWARM, b"record")
    opened = open_request(proof, method=method, path=path, body=body, now_unix=NOW)
    assert opened.signer == signer.public_key
    _, _, other = append_request(SWARM, b"another")
    with pytest.raises(InvalidRecord):
        open_request(proof, method=method, path=path, body=other, now_unix=NOW)
    assert append_proof(None, SWARM, b"record", at=NOW) == ""
