"""Requests that only an administrator may make, proven by a signature over each.

The proof covers method, path and body, and a nonce and a time, so that whoever reads it
on the way can neither change the request nor make it again.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
from typing import Annotated

import msgspec
from msgspec import Meta
from msgspec.structs import replace

from pals.errors import InvalidRecord
from pals.swarm.encoding import decode_strict
from pals.swarm.identity import Identity, verify
from pals.swarm.kdf import VERSION, length_prefixed
from pals.swarm.records import Key, Signature, UnixSeconds

HEADER = "pals-authorization"
WINDOW_S = 300
NONCE_BYTES = 16
MAX_PROOF_CHARS = 512

_LABEL = VERSION + b"request\0"


class RequestProof(
    msgspec.Struct, frozen=True, kw_only=True, array_like=True, forbid_unknown_fields=True
):
    """Who asks, and when.

    Attributes:
        signer: Ed25519 key of the operator or an admin.
        at: Unix seconds, by the signer's clock.
        nonce: 16 random bytes that no other request of the signer has.
        signature: By ``signer``, over the request too.
    """

    signer: Key
    at: UnixSeconds
    nonce: Annotated[bytes, Meta(min_length=NONCE_BYTES, max_length=NONCE_BYTES)]
    signature: Signature = b""


def sign_request(signer: Identity, *, method: str, path: str, body: bytes, at: int) -> str:
    """Return the value of the header that proves who makes a request."""
    proof = RequestProof(signer=signer.public_key, at=at, nonce=os.urandom(NONCE_BYTES))
    signature = signer.sign(_signed_part(proof, method, path, body))
    data = msgspec.msgpack.encode(replace(proof, signature=signature))
    return base64.urlsafe_b64encode(data).decode()


def open_request(
    value: str, *, method: str, path: str, body: bytes, now_unix: float
) -> RequestProof:
    """Check the proof of a request; whether its nonce is new is for the caller to say.

    Raises:
        InvalidRecord: Malformed, too old or from the future, or not the signer's over this
            very request.
    """
    try:
        data = base64.b64decode(value[:MAX_PROOF_CHARS], altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        raise _invalid("it is not base64url") from None
    proof = decode_strict(_DECODER, data, kind="request", max_bytes=MAX_PROOF_CHARS)
    if abs(now_unix - proof.at) > WINDOW_S:
        raise _invalid(
            f"its time differs by {abs(now_unix - proof.at):.0f} s, more than {WINDOW_S} s; "
            "set the clocks"
        )
    if not verify(proof.signer, proof.signature, _signed_part(proof, method, path, body)):
        raise _invalid("not signed by whom it names")
    return proof


_DECODER = msgspec.msgpack.Decoder(RequestProof)


def _signed_part(proof: RequestProof, method: str, path: str, body: bytes) -> bytes:
    request = length_prefixed(method.encode(), path.encode(), hashlib.sha256(body).digest())
    return _LABEL + request + msgspec.msgpack.encode(replace(proof, signature=b""))


def _invalid(problem: str) -> InvalidRecord:
    return InvalidRecord(kind="request", problem=problem)
