"""Announcements: what is signed is read back, and nothing else is accepted."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pals.errors import InvalidRecord
from pals.net.announce import (
    CLOCK_SKEW_S,
    MAX_ADDRESSES,
    MAX_LIFETIME_S,
    MAX_RECORD_BYTES,
    MAX_SEQ,
    Announcement,
    newest,
    open_announcement,
    sign_announcement,
    useful_first,
)
from pals.swarm.identity import SIGNATURE_BYTES, Identity
from pals.types import LayerRange

NOW = 1_900_000_000.0
IDENTITY = Identity.from_seed(bytes(range(32)))
OTHER = Identity.from_seed(bytes(32))
ANNOUNCEMENT = Announcement(
    peer=IDENTITY.peer_id,
    model_id="org/model",
    manifest=bytes(32),
    layers=LayerRange(0, 10),
    num_layers=30,
    layer_hashes=tuple(bytes([i]) * 16 for i in range(10)),
    dtype="bf16",
    free_tokens=4,
    max_context_tokens=2048,
    step_ms=12.5,
    addresses=("/ip4/192.0.2.1/tcp/4001",),
    seq=7,
    expires_at=NOW + 300,
)


def open_now(data: bytes, *, now: float = NOW, members=(IDENTITY.peer_id, OTHER.peer_id)):
    return open_announcement(data, now_unix=now, is_member=lambda peer: peer in members)


def forge(**changes) -> bytes:
    """Sign whatever the honest signer would refuse to sign."""
    a = replace(ANNOUNCEMENT, **changes)
    fields = [a.peer, a.model_id, a.manifest, a.layers.start, a.layers.stop, a.num_layers]
    fields += [
        a.layer_hashes,
        a.dtype,
        a.free_tokens,
        a.max_context_tokens,
        a.step_ms,
        a.addresses,
        a.seq,
        a.expires_at,
        a.state,
    ]
    body = msgspec.msgpack.encode(fields)
    return IDENTITY.sign(b"pals/1 announcement\x00" + body) + body


def test_what_is_signed_is_read_back():
    assert open_now(sign_announcement(IDENTITY, ANNOUNCEMENT)) == ANNOUNCEMENT


def test_the_forging_helper_makes_a_valid_record_when_it_changes_nothing():
    assert open_now(forge()) == ANNOUNCEMENT


@pytest.mark.parametrize(
    "changes",
    [
        {"peer": OTHER.peer_id},
        {"peer": "12D3KooWnotapeer"},
        {"manifest": bytes(31)},
        {"layers": LayerRange(25, 31)},
        {"num_layers": 10_001},
        {"dtype": "f16"},
        {"layer_hashes": (bytes(16),) * 9},
        {"layer_hashes": (bytes(15),) * 10},
        {"free_tokens": -1},
        {"max_context_tokens": -1},
        {"seq": -1},
        {"seq": MAX_SEQ + 1},
        {"step_ms": float("nan")},
        {"step_ms": -1.0},
        {"addresses": ("/ip4/192.0.2.1/tcp/1",) * (MAX_ADDRESSES + 1)},
        {"addresses": ("x" * 257,)},
        {"addresses": ("\x1b[2J",)},
        {"model_id": ""},
        {"expires_at": NOW},
        {"expires_at": NOW + MAX_LIFETIME_S + CLOCK_SKEW_S + 1},
        {"expires_at": float("nan")},
        {"state": "sleeping"},
    ],
    ids=str,
)
def test_a_record_out_of_its_limits_is_refused_although_it_is_signed(changes):
    with pytest.raises(InvalidRecord):
        open_now(forge(**changes))


def test_a_record_of_somebody_who_is_no_member_is_refused():
    data = sign_announcement(IDENTITY, ANNOUNCEMENT)
    with pytest.raises(InvalidRecord, match="not a live member"):
        open_now(data, members=(OTHER.peer_id,))


def test_a_record_too_large_is_refused_before_it_is_decoded():
    with pytest.raises(InvalidRecord, match=f"{MAX_RECORD_BYTES + 1} bytes"):
        open_now(bytes(MAX_RECORD_BYTES + 1))


def test_a_body_in_another_form_is_refused():
    body = sign_announcement(IDENTITY, ANNOUNCEMENT)[SIGNATURE_BYTES:]
    loose = b"\xdc\x00\x0f" + body[1:]
    signature = IDENTITY.sign(b"pals/1 announcement\x00" + loose)
    with pytest.raises(InvalidRecord, match="canonical"):
        open_now(signature + loose)


def test_signing_for_another_peer_is_refused():
    with pytest.raises(InvalidRecord, match="the signer is"):
        sign_announcement(OTHER, ANNOUNCEMENT)


def test_the_signer_refuses_what_readers_would_refuse():
    with pytest.raises(InvalidRecord):
        sign_announcement(IDENTITY, replace(ANNOUNCEMENT, layers=LayerRange(0, 31)))
    with pytest.raises(InvalidRecord, match=f"more than {MAX_RECORD_BYTES}"):
        sign_announcement(IDENTITY, replace(ANNOUNCEMENT, addresses=("é" * 256,) * MAX_ADDRESSES))


@given(st.integers(min_value=0), st.integers(min_value=1, max_value=255))
def test_a_record_changed_in_any_byte_is_refused(position, change):
    data = bytearray(sign_announcement(IDENTITY, ANNOUNCEMENT))
    data[position % len(data)] ^= change
    with pytest.raises(InvalidRecord):
        open_now(bytes(data))


@given(st.binary(max_size=600))
def test_arbitrary_bytes_raise_nothing_but_invalid_record(data):
    with pytest.raises(InvalidRecord):
        open_now(data)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.text() | st.binary(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=20,
    )
)
def test_any_signed_msgpack_raises_nothing_but_invalid_record(value):
    body = msgspec.msgpack.encode(value)
    with pytest.raises(InvalidRecord):
        open_now(IDENTITY.sign(b"pals/1 announcement\x00" + body) + body)


def test_the_highest_sequence_number_is_the_newest():
    older, newer = ANNOUNCEMENT, replace(ANNOUNCEMENT, seq=8, expires_at=NOW + 1)
    assert newest([older, newer]) == 1
    assert newest([newer, older]) == 0


def test_addresses_that_lead_here_from_elsewhere_go_first():
    loopback = ["/ip4/127.0.0.1/tcp/1/p2p/x", "/ip6/::1/tcp/1/p2p/x"]
    local = ["/ip4/172.17.0.1/tcp/1/p2p/x", "/ip6/fe80::1/tcp/1/p2p/x", "/ip4/169.254.1.1/tcp/1"]
    lan = ["/ip4/192.168.1.2/tcp/1/p2p/x", "/ip4/10.0.0.2/tcp/1", "/ip4/203.0.113.1/tcp/1"]
    lan += ["/ip6/2001:db8::1/tcp/1", "/dns4/example.org/tcp/1", "not an address"]
    assert useful_first([*loopback, *local, *lan]) == (*lan, *local, *loopback)
