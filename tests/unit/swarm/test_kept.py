from __future__ import annotations

from pathlib import Path

import pytest

from pals.config import Profile, SwarmSecret
from pals.errors import InvalidConfig, ProfileExposed
from pals.swarm import kept
from tests.unit.swarm.chains import SECRET, Chain, identity

CHAIN = Chain()
SWARM = CHAIN.swarm_id
LATER = SwarmSecret(bytes(range(32)))


@pytest.fixture
def profile(tmp_path: Path) -> Profile:
    profile = Profile(tmp_path / "profile")
    profile.create_folder()
    return profile


def test_nothing_is_kept_at_first(profile: Profile) -> None:
    assert kept.kept_invites(profile, SWARM) == {}
    assert kept.load_next_secret(profile, SWARM) is None
    assert kept.load_removals(profile, SWARM) == ()
    kept.drop_next_secret(profile, SWARM)
    kept.keep_removals(profile, SWARM, ())
    kept.drop_invite(profile, CHAIN.invite())


def test_invites_are_kept_in_their_newest_form_until_they_are_dropped(profile: Profile) -> None:
    first, second = CHAIN.invite(), CHAIN.invite()
    for invite in (first, second, first.with_secret(epoch=1, secret=LATER)):
        kept.keep_invite(profile, invite)

    texts = kept.kept_invites(profile, SWARM)
    assert set(texts) == {first.signing_key.public_key, second.signing_key.public_key}
    renewed = texts[first.signing_key.public_key]
    assert (renewed.epoch, renewed.secret.reveal()) == (1, LATER.reveal())
    assert renewed.auth == first.auth
    assert texts[second.signing_key.public_key].secret.reveal() == SECRET.reveal()

    kept.drop_invite(profile, first)
    assert set(kept.kept_invites(profile, SWARM)) == {second.signing_key.public_key}


def test_next_secret_survives_the_disk_and_shows_in_no_repr(profile: Profile) -> None:
    kept.keep_next_secret(profile, SWARM, 3, LATER)
    following = kept.load_next_secret(profile, SWARM)
    assert following is not None
    assert (following[0], following[1].reveal()) == (3, LATER.reveal())
    shown = repr(kept.NextSecret(epoch=3, secret=LATER.to_text()))
    assert LATER.to_text() not in shown + repr(following)
    kept.drop_next_secret(profile, SWARM)
    assert kept.load_next_secret(profile, SWARM) is None


def test_removals_survive_the_disk(profile: Profile) -> None:
    removal = CHAIN.remove(identity(5), joined=bytes(32))
    kept.keep_removals(profile, SWARM, (removal,))
    assert kept.load_removals(profile, SWARM) == (removal,)
    kept.keep_removals(profile, SWARM, ())
    assert not kept.removals_path(profile, SWARM).exists()


def fill(profile: Profile) -> list[Path]:
    """Keep one of each, and return the files."""
    kept.keep_invite(profile, CHAIN.invite())
    kept.keep_next_secret(profile, SWARM, 3, LATER)
    kept.keep_removals(profile, SWARM, (CHAIN.remove(identity(5), joined=bytes(32)),))
    return [path for path in profile.path.rglob("*") if path.is_file()]


def read(profile: Profile) -> None:
    kept.kept_invites(profile, SWARM)
    kept.load_next_secret(profile, SWARM)
    kept.load_removals(profile, SWARM)


def test_everything_kept_is_private(profile: Profile) -> None:
    for path in fill(profile):
        assert path.stat().st_mode & 0o777 == 0o600
        path.chmod(0o640)
        with pytest.raises(ProfileExposed):
            read(profile)
        path.chmod(0o600)
    read(profile)


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff\xfe", b"[" * 10_000, b"\x91\x91\xc0"])
def test_damaged_file_is_named_and_quoted_by_nothing(profile: Profile, content: bytes) -> None:
    for path in fill(profile):
        whole = path.read_bytes()
        for damage in (content, whole[:-1]):
            path.write_bytes(damage)
            with pytest.raises(InvalidConfig) as caught:
                read(profile)
            assert caught.value.fields["source"] == path
            assert LATER.to_text() not in str(caught.value)
        path.write_bytes(whole)


def test_links_are_not_followed(profile: Profile, tmp_path: Path) -> None:
    for path in fill(profile):
        path.rename(tmp_path / "elsewhere")
        path.symlink_to(tmp_path / "elsewhere")
    assert kept.load_next_secret(profile, SWARM) is None
    assert kept.load_removals(profile, SWARM) == ()
    kept.keep_next_secret(profile, SWARM, 4, LATER)  # in place of the link, not through it
    assert (tmp_path / "elsewhere").read_bytes().startswith(b"{") is False
