"""The published vectors: Pals and the second implementation agree on every one."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest

from pals.errors import InvalidRecord
from pals.net.wire import (
    HEADER_BYTES,
    Frame,
    FrameHead,
    Lane,
    LinkAddress,
    Row,
    Rows,
    check_header,
    hidden_shape,
    pack_header,
    pack_rows,
    parse_body,
)
from pals.swarm.identity import Identity
from pals.swarm.invite import Invite
from pals.swarm.keys import (
    FrameKey,
    epoch_prk,
    frame_key,
    key_confirmation,
    link_id,
    link_prk,
    secret_commitment,
)
from pals.swarm.sealing import open_secret, seal_secret
from pals.types import PeerId, SessionId, SwarmId
from tests.vectors import make_keys, second

VECTOR: dict[str, Any] = json.loads(make_keys.FILE.read_text())
SWARM_ID, SECRET, EPOCH = SwarmId(make_keys.SWARM_ID), make_keys.SECRET, make_keys.EPOCH
SENDER, RECEIVER = (PeerId(peer) for peer in make_keys.PEERS)


def unhex(*path: str) -> bytes:
    value: Any = VECTOR
    for name in path:
        value = value[name]
    return bytes.fromhex(value)


def product_frame_key() -> FrameKey:
    return frame_key(unhex("link_prk"), SENDER, RECEIVER, VECTOR["lane"])


def test_second_implementation_imports_nothing_of_pals_nor_of_its_cipher_library() -> None:
    tree = ast.parse(Path(second.__file__).read_text())
    names = [a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names]
    names += [n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]

    assert {"hashlib", "hmac", "Crypto.Cipher"} <= set(names)
    assert not [name for name in names if name.startswith(("pals", "tests", "cryptography"))]


def test_published_vectors_are_those_of_the_second_implementation() -> None:
    assert json.loads(json.dumps(make_keys.vectors())) == VECTOR


# --- from the secret to a frame ----------------------------------------------------------


def test_schedule_gives_the_published_keys() -> None:
    epoch_key = epoch_prk(SWARM_ID, EPOCH, SECRET)
    link_key = link_prk(
        epoch_key,
        unhex("shared_dh"),
        unhex("initiator_share"),
        unhex("responder_share"),
        SENDER,
        RECEIVER,
    )

    assert epoch_key == unhex("epoch_prk")
    assert secret_commitment(EPOCH, SECRET) == unhex("commitment")
    assert link_key == unhex("link_prk")
    assert link_id(link_key) == unhex("link_id")
    assert key_confirmation(link_key, "initiator") == unhex("confirm_initiator")
    assert key_confirmation(link_key, "responder") == unhex("confirm_responder")


def test_frame_key_seals_the_published_bodies_one_after_another() -> None:
    key, header = product_frame_key(), unhex("header")
    frames = [key.seal(header, bytes.fromhex(body)) for body in VECTOR["bodies"]]

    assert [frame[len(header) :].hex() for frame in frames] == VECTOR["sealed"]


def frame_parts() -> tuple[bytes, Rows, bytes]:
    """Return header, row table and payload of the published frame, as Pals writes them."""
    rows = Rows.of(*(Row(SessionId(bytes.fromhex(r[0])), *r[1:]) for r in VECTOR["frame"]["rows"]))
    payload = unhex("frame", "payload")
    body_bytes = len(pack_rows(rows)) + len(payload)
    header = pack_header(address(), Lane.DECODE, 0, shape(), len(rows), body_bytes)
    return header, rows, payload


def address() -> LinkAddress:
    return LinkAddress(swarm=SWARM_ID[:16], epoch=EPOCH, link=unhex("link_id"))


def shape() -> Any:
    v = VECTOR["frame"]
    return hidden_shape(unhex("frame", "manifest"), v["boundary"], "bf16", v["width"])


def test_frame_with_its_header_and_row_table_is_the_published_one() -> None:
    header, rows, payload = frame_parts()

    sealed = product_frame_key().seal(header, pack_rows(rows) + payload)

    assert sealed.hex() == VECTOR["frame"]["bytes"]


def test_published_frame_is_read_back() -> None:
    data = unhex("frame", "bytes")
    head: FrameHead = check_header(
        data[:HEADER_BYTES],
        peer=SENDER,
        address=address(),
        lane=Lane.DECODE,
        counter=0,
        accepted=(shape(),),
    )
    body = product_frame_key().open(data[:HEADER_BYTES], data[HEADER_BYTES:])
    frame: Frame = parse_body(SENDER, Lane.DECODE, head, body)

    _, rows, payload = frame_parts()
    assert (frame.rows, bytes(frame.payload)) == (rows, payload)


# --- invites -----------------------------------------------------------------------------


def test_invite_splits_as_published() -> None:
    invite = Invite.parse(VECTOR["invite"]["text"])

    assert invite.auth == unhex("invite", "auth")
    assert invite.redeem_hash == unhex("invite", "redeem_hash")
    assert invite.signing_key.public_key == unhex("invite", "signing_key")
    assert (invite.swarm_id, invite.epoch) == (SWARM_ID, EPOCH)
    assert invite.secret.reveal() == SECRET
    assert invite.to_text() == VECTOR["invite"]["text"]


# --- sealed secrets ----------------------------------------------------------------------


def member() -> Identity:
    return Identity.from_seed(unhex("envelope", "identity"))


def test_published_envelope_opens_for_its_member() -> None:
    sealed = unhex("envelope", "sealed")

    assert member().peer_id == VECTOR["envelope"]["peer"]
    assert open_secret(sealed, identity=member(), swarm_id=SWARM_ID, epoch=EPOCH) == SECRET


def test_second_implementation_opens_what_pals_seals() -> None:
    sealed = seal_secret(
        SECRET,
        exchange=unhex("envelope", "exchange"),
        swarm_id=SWARM_ID,
        epoch=EPOCH,
        peer=member().peer_id,
    )

    private = second.exchange_key(unhex("envelope", "identity"))
    info = second.envelope_info(SWARM_ID, EPOCH, VECTOR["envelope"]["peer"])
    assert second.hpke_open(private, info, sealed) == SECRET


@pytest.mark.parametrize("bit", range(0, 8 * 80, 7))
def test_published_envelope_with_one_bit_changed_does_not_open(bit: int) -> None:
    sealed = bytearray(unhex("envelope", "sealed"))
    sealed[bit // 8] ^= 1 << bit % 8
    with pytest.raises(InvalidRecord):
        open_secret(bytes(sealed), identity=member(), swarm_id=SWARM_ID, epoch=EPOCH)
