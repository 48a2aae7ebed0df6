"""Ed25519 identities and the libp2p peer ids that name them."""

from __future__ import annotations

from contextlib import suppress

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import (
    Ed25519PrivateKey,
    Ed25519PublicKey,
)
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from pals.config import Profile, create_private, read_private
from pals.errors import InvalidConfig, InvalidRecord
from pals.swarm.kdf import expand, extract
from pals.types import PeerId

KEY_BYTES = 32
SIGNATURE_BYTES = 64

_ALPHABET = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
_DIGITS = {letter: value for value, letter in enumerate(_ALPHABET)}
_MULTIHASH_PREFIX = bytes([0x00, 0x24, 0x08, 0x01, 0x12, 0x20])
"""Identity multihash of 36 bytes: libp2p's protobuf PublicKey{Ed25519, 32 bytes}."""

_PEER_ID_CHARS = 52


class Identity:
    """One Ed25519 private key; it never shows in a repr and does not pickle."""

    __slots__ = ("_key", "peer_id", "public_key")

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        self.public_key: bytes = key.public_key().public_bytes_raw()
        self.peer_id: PeerId = peer_id_of(self.public_key)

    @classmethod
    def generate(cls) -> Identity:
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def from_seed(cls, seed: bytes) -> Identity:
        """Return the identity whose private key is the 32 bytes ``seed``."""
        return cls(Ed25519PrivateKey.from_private_bytes(seed))

    @classmethod
    def from_pem(cls, pem: bytes) -> Identity:
        """Read an unencrypted PKCS#8 PEM file.

        Raises:
            ValueError: ``pem`` is not an Ed25519 private key.
        """
        try:
            key = serialization.load_pem_private_key(pem, password=None)
        except TypeError as error:
            raise ValueError("the key is encrypted") from error
        if not isinstance(key, Ed25519PrivateKey):
            raise ValueError("not an Ed25519 private key")  # noqa: TRY004 - the file is wrong, not the caller
        return cls(key)

    def to_pem(self) -> bytes:
        return self._key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )

    def reveal_seed(self) -> bytes:
        """Return the 32 private bytes, for the libp2p host."""
        return self._key.private_bytes_raw()

    def sign(self, data: bytes) -> bytes:
        return self._key.sign(data)

    def exchange_key(self) -> X25519PrivateKey:
        """Return the X25519 key to which other members seal secrets for this one.

        It is derived from the seed by HKDF, so that a profile keeps one secret file and
        the two keys stay independent.
        """
        prk = extract(b"pals/1 identity", self.reveal_seed())
        return X25519PrivateKey.from_private_bytes(expand(prk, b"exchange key"))

    def __repr__(self) -> str:
        return f"Identity({self.peer_id})"

    def __reduce__(self) -> str:
        raise TypeError("an Identity is not copied or pickled")


def verify(public_key: bytes, signature: bytes, data: bytes) -> bool:
    """Return whether ``signature`` is ``public_key``'s over ``data``; never raises."""
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(signature, data)
    except (InvalidSignature, ValueError):
        return False
    return True


def peer_id_of(public_key: bytes) -> PeerId:
    """Return the peer id of a 32-byte Ed25519 public key (libp2p peer-ids spec)."""
    number = int.from_bytes(_MULTIHASH_PREFIX + public_key, "big")
    letters: list[str] = []
    while number:
        number, digit = divmod(number, 58)
        letters.append(_ALPHABET[digit])
    # The multihash starts with one zero byte, which base58 writes as one leading "1".
    return PeerId("1" + "".join(reversed(letters)))


def public_key_of(peer_id: str) -> bytes:
    """Return the Ed25519 public key inside a peer id.

    Raises:
        InvalidRecord: ``peer_id`` is not a canonical Ed25519 peer id.
    """
    if len(peer_id) != _PEER_ID_CHARS or not all(letter in _DIGITS for letter in peer_id):
        raise InvalidRecord(kind="peer id", problem="not base58 of the right length")
    number = 0
    for letter in peer_id:
        number = number * 58 + _DIGITS[letter]
    size = len(_MULTIHASH_PREFIX) + KEY_BYTES
    raw = number.to_bytes(size, "big") if number.bit_length() <= 8 * size else b""
    public_key = raw[len(_MULTIHASH_PREFIX) :]
    if peer_id_of(public_key) != peer_id:
        raise InvalidRecord(kind="peer id", problem="not an Ed25519 identity")
    return public_key


def load_or_create_identity(profile: Profile) -> Identity:
    """Return the profile's identity, made on the first call.

    Raises:
        ProfileMissing: The profile folder is not there.
        ProfileExposed: Others can read the folder or the key.
        InvalidConfig: The file is not an Ed25519 key; it is never overwritten.
    """
    profile.check_folder()
    path = profile.identity_path
    if not path.exists():
        # Another process that makes one at this moment may already use its own.
        with suppress(FileExistsError):
            create_private(path, Identity.generate().to_pem())
    try:
        return Identity.from_pem(read_private(path))
    except ValueError as error:
        raise InvalidConfig(
            source=path, problem=str(error), advice="restore it from a backup or make a new profile"
        ) from error
