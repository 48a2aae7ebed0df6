"""Invites: the one string that an operator hands to a joiner.

``pp_inv_<redeem half>.<secret half>``, both base64url without padding::

    redeem half  version (1) || token (32) || swarm id (32) || backend's address (UTF-8)
    secret half  epoch (8) || swarm secret (32) || checksum (8)

The token splits by HKDF into ``auth``, which the backend sees once and keeps only as a
hash, and the seed of the key that signs the join. No server ever sees the secret half.
The checksum covers everything, so that a typing error never reaches the network.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import os
import re
import struct
from urllib.parse import urlsplit

from pals.config import SwarmSecret
from pals.errors import InvalidInvite
from pals.swarm.addresses import is_peer_address, peer_address_problem
from pals.swarm.identity import Identity
from pals.swarm.kdf import VERSION, expand
from pals.types import SwarmId

PREFIX = "pp_inv_"
MAX_INVITE_CHARS = 1024
MAX_URL_CHARS = 256

_VERSION = 1
_REDEEM = struct.Struct(">B32s32s")
_SECRET = struct.Struct(">Q32s8s")
_TEXT = re.compile(rf"{PREFIX}([A-Za-z0-9_-]+)\.([A-Za-z0-9_-]+)")


class Invite:
    """A parsed invite; its repr shows no secret."""

    __slots__ = ("_token", "backend_url", "epoch", "secret", "swarm_id")

    def __init__(
        self,
        *,
        token: bytes,
        swarm_id: SwarmId,
        backend_url: str,
        epoch: int,
        secret: SwarmSecret,
    ) -> None:
        problem = backend_url_problem(backend_url)
        if problem is not None:
            raise InvalidInvite(problem=f"the backend's address {problem}")
        self._token = token
        self.swarm_id = swarm_id
        self.backend_url = backend_url
        self.epoch = epoch
        self.secret = secret

    @classmethod
    def generate(
        cls, *, swarm_id: SwarmId, backend_url: str, epoch: int, secret: SwarmSecret
    ) -> Invite:
        """Return an invite with a fresh token.

        Raises:
            InvalidInvite: ``backend_url`` is neither an HTTP nor a libp2p address, or too long.
        """
        return cls(
            token=os.urandom(32),
            swarm_id=swarm_id,
            backend_url=backend_url,
            epoch=epoch,
            secret=secret,
        )

    @classmethod
    def parse(cls, text: str) -> Invite:
        """Read the text form.

        Raises:
            InvalidInvite: Damaged in any way, or made by a newer version.
        """
        match = _TEXT.fullmatch(text.strip()) if len(text) <= MAX_INVITE_CHARS else None
        if match is None:
            raise InvalidInvite(problem="it does not look like `pp_inv_….…`")
        redeem, secret_half = _decode(match[1]), _decode(match[2])
        if len(redeem) <= _REDEEM.size or len(secret_half) != _SECRET.size:
            raise InvalidInvite(problem="a part of it is missing")
        version, token, swarm_id = _REDEEM.unpack_from(redeem)
        if version != _VERSION:
            raise InvalidInvite(problem=f"it has version {version}, this program reads {_VERSION}")
        epoch, secret, checksum = _SECRET.unpack(secret_half)
        if not hmac.compare_digest(checksum, _checksum(redeem, epoch, secret)):
            raise InvalidInvite(problem="the checksum is wrong, so a character was changed")
        try:
            url = redeem[_REDEEM.size :].decode()
        except UnicodeDecodeError:
            raise InvalidInvite(problem="the backend's address is not text") from None
        return cls(
            token=token,
            swarm_id=SwarmId(swarm_id),
            backend_url=url,
            epoch=epoch,
            secret=SwarmSecret(secret),
        )

    def to_text(self) -> str:
        redeem = _REDEEM.pack(_VERSION, self._token, self.swarm_id) + self.backend_url.encode()
        key = self.secret.reveal()
        secret_half = _SECRET.pack(self.epoch, key, _checksum(redeem, self.epoch, key))
        return f"{PREFIX}{_encode(redeem)}.{_encode(secret_half)}"

    def with_secret(self, *, epoch: int, secret: SwarmSecret) -> Invite:
        """Return the same invite with the secret of a later epoch."""
        return Invite(
            token=self._token,
            swarm_id=self.swarm_id,
            backend_url=self.backend_url,
            epoch=epoch,
            secret=secret,
        )

    @property
    def auth(self) -> bytes:
        """The 32 bytes that the joiner shows to the backend."""
        return expand(self._token, b"invite redeem")

    @property
    def redeem_hash(self) -> bytes:
        """SHA-256 of `auth`: all that the backend keeps."""
        return hashlib.sha256(self.auth).digest()

    @property
    def signing_key(self) -> Identity:
        """The key that signs joins and whose public half the operator certifies."""
        return Identity.from_seed(expand(self._token, b"invite sign"))

    def __repr__(self) -> str:
        return f"Invite(swarm={self.swarm_id.hex()[:8]}, backend={self.backend_url!r})"

    def __reduce__(self) -> str:
        raise TypeError("an Invite is not copied or pickled")


def backend_url_problem(url: str) -> str | None:
    """Return what keeps ``url`` from being the address of a backend, or None.

    It is a plain ``http(s)://host[:port][/path]``, or a multiaddr that names a peer.
    """
    if len(url) > MAX_URL_CHARS:
        return f"is over {MAX_URL_CHARS} characters long"
    if is_peer_address(url):
        return peer_address_problem(url)
    try:
        parts = urlsplit(url)
        port_fits = parts.port is None or parts.port > 0
    except ValueError:
        return "is not a URL"
    if parts.scheme not in ("http", "https") or not parts.hostname:
        return "does not start with http:// or https:// and a host"
    if parts.username or parts.password or parts.query or parts.fragment or not port_fits:
        return "has parts that do not belong there"
    if not url.isprintable() or " " in url:
        return "has blanks or control characters"
    return None


def _checksum(redeem: bytes, epoch: int, secret: bytes) -> bytes:
    data = VERSION + b"invite checksum\0" + redeem + struct.pack(">Q", epoch) + secret
    return hashlib.sha256(data).digest()[:8]


def _encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _decode(text: str) -> bytes:
    try:
        data = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    except binascii.Error:
        raise InvalidInvite(problem="it is not base64url") from None
    # Unused bits at the end would let two texts mean one invite.
    if _encode(data) != text:
        raise InvalidInvite(problem="it is not base64url in its one form")
    return data
