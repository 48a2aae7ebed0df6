from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.peer.id import ID

from pals.config import Profile, write_private
from pals.errors import InvalidConfig, InvalidRecord, ProfileExposed, ProfileMissing
from pals.swarm.identity import (
    Identity,
    load_or_create_identity,
    peer_id_of,
    public_key_of,
    verify,
)

seeds = st.binary(min_size=32, max_size=32)


@pytest.fixture
def profile(tmp_path: Path) -> Profile:
    profile = Profile(tmp_path / "profile")
    profile.create_folder()
    return profile


@given(seeds)
def test_peer_id_equals_libp2ps(seed: bytes) -> None:
    pair = create_new_key_pair(seed)
    assert Identity.from_seed(seed).peer_id == ID.from_pubkey(pair.public_key).to_base58()


@given(seeds)
def test_public_key_is_read_back_from_the_peer_id(public_key: bytes) -> None:
    assert public_key_of(peer_id_of(public_key)) == public_key


@given(st.text(max_size=60) | st.text("12D3KooW", min_size=52, max_size=52))
def test_any_other_text_is_no_peer_id(text: str) -> None:
    with pytest.raises(InvalidRecord):
        public_key_of(text)


def test_rsa_peer_id_is_refused() -> None:
    with pytest.raises(InvalidRecord):
        public_key_of("QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N")


def test_signature_verifies_only_for_key_and_data() -> None:
    identity = Identity.generate()
    signature = identity.sign(b"data")
    assert verify(identity.public_key, signature, b"data")
    assert not verify(identity.public_key, signature, b"other")
    assert not verify(Identity.generate().public_key, signature, b"data")
    assert not verify(b"short", signature, b"data")
    assert not verify(identity.public_key, b"short", b"data")


def test_identity_survives_pem() -> None:
    identity = Identity.generate()
    assert Identity.from_pem(identity.to_pem()).reveal_seed() == identity.reveal_seed()


def test_exchange_key_is_stable_and_not_the_signing_key() -> None:
    identity = Identity.from_seed(bytes(32))
    first, second = identity.exchange_key(), identity.exchange_key()
    assert first.private_bytes_raw() == second.private_bytes_raw()
    assert first.private_bytes_raw() != identity.reveal_seed()


def test_identity_hides_its_key() -> None:
    identity = Identity.generate()
    assert identity.reveal_seed().hex() not in repr(identity)
    for duplicate in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError):
            duplicate(identity)


def test_profile_keeps_one_private_identity(profile: Profile) -> None:
    first = load_or_create_identity(profile)
    assert profile.identity_path.stat().st_mode & 0o777 == 0o600
    assert load_or_create_identity(profile).peer_id == first.peer_id


def test_identity_made_by_another_process_meanwhile_is_kept(
    profile: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate, others = Identity.generate, Identity.generate()

    def lose_the_race() -> Identity:
        write_private(profile.identity_path, others.to_pem())
        return generate()

    monkeypatch.setattr(Identity, "generate", lose_the_race)
    assert load_or_create_identity(profile).peer_id == others.peer_id
    assert [path.name for path in profile.path.iterdir()] == ["identity.key"]


def test_missing_profile_is_named(tmp_path: Path) -> None:
    with pytest.raises(ProfileMissing):
        load_or_create_identity(Profile(tmp_path / "nothing"))


@pytest.mark.parametrize("content", [b"", b"garbage", b"-----BEGIN PRIVATE KEY-----\nAA\n"])
def test_damaged_identity_is_refused_and_kept(profile: Profile, content: bytes) -> None:
    profile.identity_path.write_bytes(content)
    profile.identity_path.chmod(0o600)
    with pytest.raises(InvalidConfig):
        load_or_create_identity(profile)
    assert profile.identity_path.read_bytes() == content


def test_exposed_identity_is_refused(profile: Profile) -> None:
    load_or_create_identity(profile)
    profile.identity_path.chmod(0o644)
    with pytest.raises(ProfileExposed) as caught:
        load_or_create_identity(profile)
    assert caught.value.fields["mode"] == 0o644
