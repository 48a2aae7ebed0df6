from __future__ import annotations

from collections.abc import Iterator

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from pals.errors import LinkRefused, WireVersionMismatch
from pals.net.handshake import (
    CONFIRMATION_BYTES,
    NONCE_BYTES,
    PREFIX_BYTES,
    Handshake,
    LinkSecrets,
    Status,
)
from pals.net.wire import Codec
from pals.swarm.keys import Role, epoch_prk, key_confirmation, link_id, link_prk
from pals.types import SwarmId
from tests.unit.net.handshakes import (
    CONFIRMATION,
    EPOCH,
    HELLO,
    HELLO_BYTES,
    INITIATOR,
    RESPONDER,
    SECRET,
    SWARM,
    WELCOME,
    A,
    B,
    C,
    link_keys,
    make_secrets,
    make_side,
    pump,
    shake_hands,
)


def test_both_sides_end_with_the_same_link() -> None:
    assert INITIATOR.address == RESPONDER.address
    assert INITIATOR.prk == RESPONDER.prk
    assert (INITIATOR.local, INITIATOR.remote) == (A, B)
    assert (RESPONDER.local, RESPONDER.remote) == (B, A)
    assert INITIATOR.address.swarm == SWARM[:16]
    assert INITIATOR.address.epoch == EPOCH


def test_keys_are_those_of_the_documented_schedule() -> None:
    ours = X25519PrivateKey.from_private_bytes(bytes([11]) * 32)
    theirs = X25519PrivateKey.from_private_bytes(bytes([22]) * 32)
    shares = [
        nonce * NONCE_BYTES + key.public_key().public_bytes_raw() + b"\0"
        for nonce, key in ((b"i", ours), (b"r", theirs))
    ]
    proposal = SWARM[:16] + EPOCH.to_bytes(8, "big")
    assert b"PALS\x03\x00" + proposal + shares[0] == HELLO
    assert WELCOME[:HELLO_BYTES] == b"PALS\x03\x00" + proposal + shares[1]
    prk = link_prk(
        epoch_prk(SWARM, EPOCH, SECRET), ours.exchange(theirs.public_key()), *shares, A, B
    )
    assert INITIATOR.prk == prk
    assert WELCOME[HELLO_BYTES:] == key_confirmation(prk, "responder")
    assert key_confirmation(prk, "initiator") == CONFIRMATION
    assert INITIATOR.address.link == link_id(prk)


@pytest.mark.parametrize(
    ("ours", "theirs", "agreed"),
    [
        (Codec.RAW, Codec.RAW, Codec.RAW),
        (Codec.INT8, Codec.INT8, Codec.INT8),
        (Codec.INT8, Codec.RAW, Codec.RAW),
        (Codec.RAW, Codec.INT8, Codec.RAW),
    ],
)
def test_prefill_codec_is_what_both_propose(ours: Codec, theirs: Codec, agreed: Codec) -> None:
    ends = link_keys(
        make_side("initiator", secrets=make_secrets(A, codec=ours)),
        make_side("responder", secrets=make_secrets(B, codec=theirs)),
    )
    assert [keys.prefill_codec for keys in ends] == [agreed, agreed]


def test_codec_that_nobody_here_knows_is_proposed_in_vain() -> None:
    initiator, responder = make_side("initiator"), make_side("responder")
    outcome = shake_hands(initiator, responder, tamper={"hello": HELLO[:-1] + b"\x63"})
    # Nor can it be pushed in on the way: the keys bind what each side proposed.
    assert isinstance(outcome.initiator_error, LinkRefused)
    assert outcome.initiator_error.fields["problem"] == "the swarm secrets differ"


def test_flights_have_the_documented_sizes() -> None:
    assert (len(HELLO), len(WELCOME), len(CONFIRMATION)) == (79, 111, 32)


@pytest.mark.parametrize(
    ("initiator", "responder"),
    [
        pytest.param(make_side("initiator", nonce=b"n" * 16), None, id="initiator's nonce"),
        pytest.param(None, make_side("responder", nonce=b"n" * 16), id="responder's nonce"),
        pytest.param(make_side("initiator", ephemeral=33), None, id="initiator's key"),
        pytest.param(None, make_side("responder", ephemeral=33), id="responder's key"),
    ],
)
def test_anything_fresh_on_either_side_gives_another_link(
    initiator: Handshake | None, responder: Handshake | None
) -> None:
    other, _ = link_keys(initiator, responder)
    assert other.prk != INITIATOR.prk
    assert other.address.link != INITIATOR.address.link


def flips(flight: bytes) -> Iterator[bytes]:
    for position in range(len(flight)):
        for mask in (0x01, 0x80):
            changed = bytearray(flight)
            changed[position] ^= mask
            yield bytes(changed)


@pytest.mark.parametrize(
    ("flight", "sent"), [("hello", HELLO), ("welcome", WELCOME), ("confirmation", CONFIRMATION)]
)
def test_flight_with_any_byte_changed_gives_the_responder_no_link(flight: str, sent: bytes) -> None:
    for changed in flips(sent):
        initiator, responder = make_side("initiator"), make_side("responder")
        outcome = shake_hands(initiator, responder, tamper={flight: changed})
        assert outcome.initiator_error or outcome.responder_error
        assert responder.keys is None
        # After its own confirmation the initiator has a link; that nobody answers on it is
        # for the lanes to find out.
        assert initiator.keys is None or flight == "confirmation"


def test_responder_of_another_version_is_told_apart_on_both_sides() -> None:
    responder = make_side("responder")
    outcome = shake_hands(
        make_side("initiator"), responder, tamper={"hello": HELLO[:4] + b"\x09" + HELLO[5:]}
    )
    assert isinstance(outcome.responder_error, WireVersionMismatch)
    assert outcome.responder_error.fields == {"peer": A, "theirs": 9, "ours": 3}
    assert outcome.responder_wrote == b"PALS" + bytes([3, Status.WRONG_VERSION])

    initiator = make_side("initiator")
    answer = b"PALS" + bytes([9, Status.WRONG_VERSION])
    outcome = shake_hands(initiator, make_side("responder"), tamper={"welcome": answer})
    assert isinstance(outcome.initiator_error, WireVersionMismatch)
    assert outcome.initiator_error.fields == {"peer": B, "theirs": 9, "ours": 3}
    assert outcome.initiator_wrote == HELLO


@pytest.mark.parametrize(
    ("secrets", "problem"),
    [
        (make_secrets(B, swarm=SwarmId(b"o" * 32)), "it belongs to another swarm"),
        (make_secrets(B, epoch=EPOCH + 1), "it is in another epoch of the swarm secret"),
    ],
)
def test_other_swarm_or_epoch_is_told_to_both_sides(secrets: LinkSecrets, problem: str) -> None:
    initiator, responder = make_side("initiator"), make_side("responder", secrets=secrets)
    outcome = shake_hands(initiator, responder)
    for error, peer in ((outcome.initiator_error, B), (outcome.responder_error, A)):
        assert isinstance(error, LinkRefused)
        assert error.fields == {"peer": peer, "problem": problem}
    assert len(outcome.responder_wrote) == PREFIX_BYTES
    assert initiator.keys is responder.keys is None


def test_responder_that_says_ok_for_another_epoch_is_refused() -> None:
    changed = bytearray(WELCOME)
    changed[PREFIX_BYTES + 16 + 7] ^= 1
    outcome = shake_hands(
        make_side("initiator"), make_side("responder"), tamper={"welcome": bytes(changed)}
    )
    assert isinstance(outcome.initiator_error, LinkRefused)
    assert outcome.initiator_wrote == HELLO


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(
            make_side("responder", secrets=make_secrets(B, secret=b"x" * 32)), id="other secret"
        ),
        pytest.param(make_side("responder", secrets=make_secrets(C)), id="responder is another"),
        pytest.param(make_side("responder", remote=C), id="initiator is another"),
    ],
)
def test_side_without_the_same_secret_and_names_gets_no_confirmation(other: Handshake) -> None:
    initiator = make_side("initiator")
    outcome = shake_hands(initiator, other)
    assert isinstance(outcome.initiator_error, LinkRefused)
    assert outcome.initiator_error.fields["problem"] == "the swarm secrets differ"
    assert outcome.initiator_wrote == HELLO
    assert initiator.keys is other.keys is None


def test_confirmation_of_the_own_role_is_refused() -> None:
    responder = make_side("responder")
    reflected = WELCOME[-CONFIRMATION_BYTES:]
    outcome = shake_hands(make_side("initiator"), responder, tamper={"confirmation": reflected})
    assert isinstance(outcome.responder_error, LinkRefused)
    assert responder.keys is None


def test_own_hello_reflected_is_refused() -> None:
    mirrored = HELLO + CONFIRMATION
    initiator = make_side("initiator", remote=A)
    outcome = shake_hands(initiator, make_side("responder"), tamper={"welcome": mirrored})
    assert isinstance(outcome.initiator_error, LinkRefused)
    assert initiator.keys is None


def test_recorded_handshake_replayed_to_a_new_responder_is_refused() -> None:
    responder = make_side("responder", ephemeral=44, nonce=b"f" * 16)
    outcome = shake_hands(
        make_side("initiator"), responder, tamper={"hello": HELLO, "confirmation": CONFIRMATION}
    )
    assert isinstance(outcome.responder_error, LinkRefused)
    assert responder.keys is None


P = 2**255 - 19
LOW_ORDER = [
    0,
    1,
    325606250916557431795983626356110631294008115727848805560023387167927233504,
    39382357235489614581723060781553021112529911719440698176882885853963445705823,
    P - 1,
    P,
    P + 1,
]
"""The u coordinates of X25519 whose shared secret is zero whatever the other key is."""


@pytest.mark.parametrize("point", LOW_ORDER)
def test_degenerate_ephemeral_key_is_refused(point: int) -> None:
    degenerate = point.to_bytes(32, "little")
    responder = make_side("responder")
    outcome = shake_hands(
        make_side("initiator"), responder, tamper={"hello": HELLO[:-33] + degenerate + HELLO[-1:]}
    )
    assert isinstance(outcome.responder_error, LinkRefused)
    assert outcome.responder_error.fields["problem"] == "its ephemeral key is degenerate"
    assert outcome.responder_wrote == b""

    welcome = WELCOME[: HELLO_BYTES - 33] + degenerate + WELCOME[HELLO_BYTES - 1 :]
    outcome = shake_hands(
        make_side("initiator"), make_side("responder"), tamper={"welcome": welcome}
    )
    assert isinstance(outcome.initiator_error, LinkRefused)
    assert outcome.initiator_error.fields["problem"] == "its ephemeral key is degenerate"


def test_unknown_status_is_refused() -> None:
    outcome = shake_hands(
        make_side("initiator"), make_side("responder"), tamper={"welcome": b"PALS\x03\x63"}
    )
    assert isinstance(outcome.initiator_error, LinkRefused)
    assert "status 99" in str(outcome.initiator_error)


def test_only_a_responder_answers_a_refusal() -> None:
    for data in (b"GET / ", b"PALS\x09\x00", b"PALS\x03\x02"):
        initiator = make_side("initiator")
        initiator.take_outgoing()
        assert pump(initiator, bytearray(data)) is not None
        assert initiator.take_outgoing() == b""


@given(st.sampled_from(["initiator", "responder"]), st.binary(max_size=150), st.integers(0, 110))
def test_arbitrary_bytes_end_a_handshake_with_a_typed_error(
    role: Role, noise: bytes, genuine: int
) -> None:
    side = make_side(role)
    prefix = (HELLO if role == "responder" else WELCOME)[:genuine]
    pump(side, bytearray(prefix + noise))
    if side.keys is not None:
        assert (prefix + noise)[: len(WELCOME)] == WELCOME


def test_reprs_show_no_key() -> None:
    secrets = make_secrets()
    assert repr(secrets) == f"LinkSecrets(swarm={SWARM.hex()[:8]}, epoch={EPOCH})"
    shown = repr(INITIATOR)
    assert shown == f"LinkKeys(link={INITIATOR.address.link.hex()[:8]}, remote={B[-8:]})"
