"""Address hints: where a member was last reachable, signed by itself.

A hint only helps to find a first peer; a wrong one costs a failed dial, because whoever
answers must still prove the peer id.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta
from msgspec.structs import replace

from pals.errors import InvalidRecord
from pals.swarm.encoding import decode_strict
from pals.swarm.identity import Identity, peer_id_of, verify
from pals.swarm.kdf import VERSION
from pals.swarm.records import Hash, Key, Signature, UnixSeconds
from pals.types import PeerId, SwarmId

MAX_HINT_BYTES = 2048
MAX_ADDRESSES = 8
MAX_CLOCK_SKEW_S = 300

_LABEL = VERSION + b"hint\0"

Address = Annotated[str, Meta(min_length=1, max_length=200, pattern=r"^/[!-~]+\Z")]


class AddressHint(
    msgspec.Struct, frozen=True, kw_only=True, array_like=True, forbid_unknown_fields=True
):
    """Where one member listens.

    Attributes:
        swarm_id: Swarm it is for.
        key: Ed25519 identity of the member.
        addresses: Multiaddrs, most useful first.
        issued_at: Unix seconds, by the member's clock; the newest hint wins.
        signature: By ``key``.
    """

    swarm_id: Hash
    key: Key
    addresses: Annotated[tuple[Address, ...], Meta(max_length=MAX_ADDRESSES)]
    issued_at: UnixSeconds
    signature: Signature = b""

    @property
    def peer(self) -> PeerId:
        return peer_id_of(self.key)


def sign_hint(
    identity: Identity, *, swarm_id: SwarmId, addresses: tuple[str, ...], issued_at: int
) -> bytes:
    """Return the signed bytes of this machine's hint; addresses past the cap are left out."""
    hint = AddressHint(
        swarm_id=swarm_id,
        key=identity.public_key,
        addresses=addresses[:MAX_ADDRESSES],
        issued_at=issued_at,
    )
    return msgspec.msgpack.encode(replace(hint, signature=identity.sign(_signed_part(hint))))


def open_hint(data: bytes, *, swarm_id: SwarmId, now_unix: float) -> AddressHint:
    """Read a hint and check its signature.

    Raises:
        InvalidRecord: Too long, malformed, for another swarm, from the future, or not
            signed by the member it names.
    """
    hint = decode_strict(_DECODER, data, kind="hint", max_bytes=MAX_HINT_BYTES)
    if hint.swarm_id != swarm_id:
        raise InvalidRecord(kind="hint", problem="it is for another swarm")
    if hint.issued_at > now_unix + MAX_CLOCK_SKEW_S:
        raise InvalidRecord(kind="hint", problem="its time lies in the future")
    if not verify(hint.key, hint.signature, _signed_part(hint)):
        raise InvalidRecord(kind="hint", problem="not signed by the peer itself")
    return hint


_DECODER = msgspec.msgpack.Decoder(AddressHint)


def _signed_part(hint: AddressHint) -> bytes:
    return _LABEL + msgspec.msgpack.encode(replace(hint, signature=b""))
