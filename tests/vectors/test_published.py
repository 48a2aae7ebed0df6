"""Wycheproof's, NIST's and the RFCs' vectors through Pals's own seal, open and verify.

Every valid vector that the product's parameters allow passes, and every invalid one is
refused. What the parameters do not allow (other key, nonce or tag sizes) is left out, but
for short tags, which the product is shown to refuse.
"""

from __future__ import annotations

import struct
from typing import Any, cast

import pytest
from Crypto.Cipher import ChaCha20_Poly1305
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from pals.errors import InvalidFrame, InvalidRecord, LinkRefused
from pals.net import noise_records
from pals.net.handshake import KeyShare, LinkSecrets, derive_keys, pack_proposal
from pals.net.noise_records import RecordError, RecordOpener, RecordSealer
from pals.swarm import sealing
from pals.swarm.identity import Identity, verify
from pals.swarm.kdf import expand_info, extract
from pals.swarm.keys import FrameKey
from pals.swarm.sealing import open_secret
from pals.types import SwarmId
from tests.vectors import published, second
from tests.vectors.published import Vector

LOCAL, REMOTE = (Identity.from_seed(bytes([n]) * 32).peer_id for n in (1, 2))
GCM = "ciphers/AES/GCM/gcm"
NONCE_BYTES, TAG_BYTES = 12, 16


def unhex(vector: dict[str, Any], *names: str) -> list[bytes]:
    return [bytes.fromhex(vector[name]) for name in names]


# --- AES-256-GCM: frames ----------------------------------------------------------------


def frame_key(key: bytes, iv: bytes) -> FrameKey:
    """Return the key whose first frame has the nonce ``iv``."""
    return FrameKey(key, iv, sender=REMOTE)


def opens(key: bytes, iv: bytes, aad: bytes, sealed: bytes, wanted: bytes) -> bool:
    try:
        return frame_key(key, iv).open(aad, sealed) == wanted
    except InvalidFrame:
        return False


def fits_frames(test: dict[str, Any]) -> bool:
    return (test["keySize"], test["ivSize"], test["tagSize"]) == (256, 96, 128)


def test_wycheproof_aes_gcm_through_the_frame_key() -> None:
    tests = [
        t for t in published.wycheproof("Cipher/wycheproof/aes_gcm_test.json") if fits_frames(t)
    ]
    for test in tests:
        key, iv, aad, body, ct, tag = unhex(test, "key", "iv", "aad", "msg", "ct", "tag")
        is_valid = test["result"] == "valid"
        assert opens(key, iv, aad, ct + tag, body) == is_valid, test["tcId"]
        if is_valid:
            assert frame_key(key, iv).seal(aad, body) == aad + ct + tag, test["tcId"]
    assert [t["result"] for t in tests].count("valid") == 39
    assert [t["result"] for t in tests].count("invalid") == 27


def nist_gcm(name: str) -> list[Vector]:
    vectors = published.fields(f"{GCM}{name}256.rsp")
    return [v for v in vectors if v["ivlen"] == "96"]


def test_nist_gcm_decryptions_through_the_frame_key() -> None:
    whole = [v for v in nist_gcm("Decrypt") if v["taglen"] == "128"]
    for v in whole:
        key, iv, aad, ct, tag = unhex(v, "key", "iv", "aad", "ct", "tag")
        body = bytes.fromhex(v.get("pt", ""))
        assert opens(key, iv, aad, ct + tag, body) == ("fail" not in v)
    assert 0 < sum("fail" in v for v in whole) < len(whole)


def test_nist_gcm_encryptions_through_the_frame_key() -> None:
    vectors = [v for v in nist_gcm("EncryptExtIV") if v["taglen"] == "128"]
    for v in vectors:
        key, iv, aad, body, ct, tag = unhex(v, "key", "iv", "aad", "pt", "ct", "tag")
        assert frame_key(key, iv).seal(aad, body) == aad + ct + tag
    assert len(vectors) > 300


def test_valid_nist_vectors_with_a_short_tag_do_not_open() -> None:
    short = [v for v in nist_gcm("Decrypt") if v["taglen"] != "128" and "fail" not in v]
    for v in short:
        key, iv, aad, ct, tag = unhex(v, "key", "iv", "aad", "ct", "tag")
        assert not opens(key, iv, aad, ct + tag, bytes.fromhex(v["pt"]))
    assert len(short) > 300


# --- ChaCha20-Poly1305: the records of Noise --------------------------------------------

BOUND = "a record is bound to no other bytes"


class FixedNonce:
    """Stands in for a record's number where a vector's nonce is not one of Noise's."""

    def __init__(self, nonce: bytes) -> None:
        self._nonce = nonce

    def pack(self, number: int) -> bytes:
        assert number == 0
        return self._nonce


def record_opens(key: bytes, sealed: bytes, wanted: bytes, number: int = 0) -> bool:
    opener = RecordOpener(key, number)
    data = struct.pack(">H", len(sealed)) + sealed
    opener.space[: len(data)] = data
    try:
        return opener.received(len(data)) == [wanted]
    except RecordError:
        return False


def test_wycheproof_chacha20_poly1305_through_the_records(monkeypatch: pytest.MonkeyPatch) -> None:
    path = "Cipher/wycheproof/chacha20_poly1305_test.json"
    tests = [t for t in published.wycheproof(path) if fits_frames(t)]
    passed = refused = 0
    for test in tests:
        key, iv, aad, body, ct, tag = unhex(test, "key", "iv", "aad", "msg", "ct", "tag")
        monkeypatch.setattr(noise_records, "_NONCE", FixedNonce(iv))
        is_valid = test["result"] == "valid" and not aad
        assert record_opens(key, ct + tag, body) == is_valid, (test["tcId"], BOUND)
        passed, refused = passed + is_valid, refused + (not is_valid)
        if is_valid and body:
            sealed = b"".join(RecordSealer(key).seal([body]))
            assert sealed[2:] == ct + tag, test["tcId"]
    assert (passed, refused) == (45, 271)


def test_boringssl_vectors_under_nonces_of_noise_through_the_records() -> None:
    vectors = published.fields("ciphers/ChaCha20Poly1305/boringssl.txt")
    for v in vectors:
        key, nonce, ct, tag = unhex(v, "key", "nonce", "ct", "tag")
        is_valid = nonce[:4] == bytes(4) and not v["ad"]
        number = int.from_bytes(nonce[4:], "little")
        assert record_opens(key, ct + tag, b"", number) == is_valid, BOUND
    assert len(vectors) == 66


def test_a_record_s_nonce_is_four_zeros_and_its_number() -> None:
    key, number, body = bytes(range(32)), 0x0807060504030201, b"a record far on"
    cipher = ChaCha20_Poly1305.new(key=key, nonce=bytes(4) + bytes(range(1, 9)))
    sealed = b"".join(cipher.encrypt_and_digest(body))

    assert b"".join(RecordSealer(key, number).seal([body]))[2:] == sealed
    assert record_opens(key, sealed, body, number)
    assert not record_opens(key, sealed, body, number + 1)


# --- HKDF-SHA256 ------------------------------------------------------------------------


def test_wycheproof_hkdf_sha256_through_the_key_schedule() -> None:
    tests = published.wycheproof("Protocol/wycheproof/hkdf_sha256_test.json")
    for test in tests:
        salt, material, info, wanted = unhex(test, "salt", "ikm", "info", "okm")
        if test["result"] == "valid":
            assert expand_info(extract(salt, material), info, test["size"]) == wanted, test["tcId"]
        else:
            with pytest.raises(ValueError):
                expand_info(extract(salt, material), info, test["size"])
    assert len(tests) == 86


def test_rfc_5869_through_the_key_schedule() -> None:
    vectors = published.fields("KDF/rfc-5869-HKDF-SHA256.txt")
    for v in vectors:
        salt, material, info, prk, wanted = unhex(v, "salt", "ikm", "info", "prk", "okm")
        assert extract(salt, material) == prk
        assert expand_info(prk, info, int(v["l"])) == wanted
    assert len(vectors) == 3


# --- X25519: the keys of links ----------------------------------------------------------


def link_secret_of(private: bytes, public: bytes) -> bytes:
    """Return the link key that Pals derives with ``private`` from the other's ``public``."""
    share = KeyShare(X25519PrivateKey.from_private_bytes(private), bytes(16))
    secrets = LinkSecrets(swarm_id=SwarmId(bytes(32)), epoch=0, epoch_prk=bytes(32), local=LOCAL)
    own = pack_proposal(secrets, share)
    theirs = own[:40] + public + own[72:]
    return derive_keys("initiator", secrets, REMOTE, share, own, theirs).prk


def expected_link_key(private: bytes, public: bytes, shared: bytes) -> bytes:
    shares = tuple(bytes(16) + key + b"\0" for key in (second.public_key(private), public))
    return second.link_prk(bytes(32), shared, cast("Any", shares), (LOCAL, REMOTE))


def test_wycheproof_x25519_through_the_key_agreement_of_links() -> None:
    tests = published.wycheproof("Protocol/wycheproof/x25519_test.json")
    degenerate = 0
    for test in tests:
        private, public, shared = unhex(test, "private", "public", "shared")
        if shared == bytes(32):
            degenerate += 1
            with pytest.raises(LinkRefused):
                link_secret_of(private, public)
        else:
            wanted = expected_link_key(private, public, shared)
            assert link_secret_of(private, public) == wanted, test["tcId"]
    assert (len(tests), degenerate) == (518, 31)


# --- Ed25519: every signature -------------------------------------------------------------


def test_wycheproof_ed25519_through_verify() -> None:
    tests = published.wycheproof("Signature/wycheproof/ed25519_test.json")
    for test in tests:
        message, signature = unhex(test, "msg", "sig")
        is_good = verify(bytes.fromhex(test["publicKey"]["pk"]), signature, message)
        if test["result"] != "acceptable":
            assert is_good == (test["result"] == "valid"), test["tcId"]
    assert len(tests) == 210


def test_ed25519_vectors_are_signed_and_verified_by_identities() -> None:
    for seed, public, message, signature in published.ed25519_signatures():
        identity = Identity.from_seed(seed)
        assert identity.public_key == public
        assert identity.sign(message) == signature
        assert verify(public, signature, message)
        assert not verify(public, signature, message + b"\0")


# --- HPKE: sealed secrets -----------------------------------------------------------------


class Recipient(Identity):
    """An identity whose exchange key is a vector's."""

    __slots__ = ("private",)

    def exchange_key(self) -> X25519PrivateKey:
        return X25519PrivateKey.from_private_bytes(self.private)


@pytest.fixture
def rfc_9180(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Let `open_secret` take the vector of its own suite: info and length are not Pals's."""
    suite = {"mode": 0, "kem_id": 0x20, "kdf_id": 1, "aead_id": 2}
    (vector,) = (v for v in published.hpke() if suite.items() <= v.items())
    monkeypatch.setattr(sealing, "_info", lambda *_: bytes.fromhex(vector["info"]))
    return vector


def recipient(vector: dict[str, Any]) -> Identity:
    made = Recipient.from_seed(bytes(32))
    cast("Recipient", made).private = bytes.fromhex(vector["skRm"])
    return made


def test_rfc_9180_keys_are_those_of_the_second_implementation(rfc_9180: dict[str, Any]) -> None:
    private, info, enc = unhex(rfc_9180, "skRm", "info", "enc")
    ephemeral, public = unhex(rfc_9180, "skEm", "pkRm")
    key, nonce = unhex(rfc_9180, "key", "base_nonce")
    sealed = enc + second.gcm_seal(key, nonce, b"text", b"")

    assert second.public_key(ephemeral) == enc
    assert second.hpke_open(private, info, sealed) == b"text"
    assert second.hpke_seal(public, ephemeral, info, b"text") == sealed


def test_rfc_9180_vector_opens_through_the_envelope(rfc_9180: dict[str, Any]) -> None:
    key, nonce, enc = unhex(rfc_9180, "key", "base_nonce", "enc")
    secret = bytes(range(32))
    sealed = enc + second.gcm_seal(key, nonce, secret, b"")
    swarm = SwarmId(bytes(32))

    assert open_secret(sealed, identity=recipient(rfc_9180), swarm_id=swarm, epoch=0) == secret
    for place in range(0, len(sealed), 5):
        changed = bytearray(sealed)
        changed[place] ^= 1
        with pytest.raises(InvalidRecord):
            open_secret(bytes(changed), identity=recipient(rfc_9180), swarm_id=swarm, epoch=0)
