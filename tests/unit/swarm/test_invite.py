from __future__ import annotations

import hashlib
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pals.config import SwarmSecret
from pals.errors import InvalidInvite
from pals.swarm.invite import MAX_INVITE_CHARS, PREFIX, Invite
from pals.types import SwarmId

TOKEN, SWARM, SECRET = b"t" * 32, SwarmId(b"s" * 32), SwarmSecret(b"k" * 32)


def invite(url: str = "http://10.0.0.5:8470") -> Invite:
    return Invite(token=TOKEN, swarm_id=SWARM, backend_url=url, epoch=3, secret=SECRET)


TEXT = invite().to_text()


def test_invite_survives_its_text() -> None:
    parsed = Invite.parse(f"  {TEXT}\n")
    assert parsed.to_text() == TEXT
    assert parsed.swarm_id == SWARM
    assert parsed.backend_url == "http://10.0.0.5:8470"
    assert parsed.epoch == 3
    assert parsed.secret.reveal() == SECRET.reveal()


def test_backend_learns_a_hash_that_gives_neither_token_nor_signing_key() -> None:
    made = invite()
    assert made.redeem_hash == hashlib.sha256(made.auth).digest()
    assert len({made.auth, made.signing_key.reveal_seed(), TOKEN, SECRET.reveal()}) == 4


def test_redeem_half_holds_no_secret() -> None:
    redeem, secret_half = TEXT.removeprefix(PREFIX).split(".")
    other = Invite(
        token=TOKEN,
        swarm_id=SWARM,
        backend_url=invite().backend_url,
        epoch=4,
        secret=SwarmSecret(b"x" * 32),
    )
    assert other.to_text().removeprefix(PREFIX).split(".")[0] == redeem
    assert other.to_text().removeprefix(PREFIX).split(".")[1] != secret_half


@given(st.integers(0, len(TEXT) - 1), st.characters())
def test_any_changed_character_is_caught(position: int, letter: str) -> None:
    damaged = TEXT[:position] + letter + TEXT[position + 1 :]
    if damaged.strip() == TEXT:
        return
    with pytest.raises(InvalidInvite):
        Invite.parse(damaged)


@given(st.integers(0, len(TEXT) - 1))
def test_truncated_invite_is_caught(length: int) -> None:
    with pytest.raises(InvalidInvite):
        Invite.parse(TEXT[:length])


@given(st.text(max_size=200))
def test_other_text_is_no_invite(text: str) -> None:
    with pytest.raises(InvalidInvite):
        Invite.parse(text)
    with pytest.raises(InvalidInvite):
        Invite.parse(PREFIX + text)


def test_oversized_text_is_refused() -> None:
    with pytest.raises(InvalidInvite):
        Invite.parse(PREFIX + "A" * MAX_INVITE_CHARS)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "ftp://host",
        "host:8470",
        "http://",
        "http://user:pass@host",
        "http://host/?q=1",
        "http://host/#f",
        "http://host:99999",
        "http://[::1",
        "http://ho st",
        "http://host/\x1b[2J",
        "http://" + "h" * 300,
    ],
)
def test_strange_backend_address_is_refused(url: str) -> None:
    with pytest.raises(InvalidInvite):
        invite(url)


def test_longest_invite_fits_the_cap() -> None:
    assert len(invite("http://" + "h" * 249).to_text()) <= MAX_INVITE_CHARS


def test_repr_and_errors_hide_the_invite() -> None:
    redeem, secret_half = TEXT.removeprefix(PREFIX).split(".")
    with pytest.raises(InvalidInvite) as caught:
        Invite.parse(TEXT[:-1] + ("A" if TEXT[-1] != "A" else "B"))
    for shown in (repr(invite()), repr(caught.value), caught.value.hint):
        assert redeem not in shown
        assert secret_half[:-1] not in shown
    with pytest.raises(TypeError):
        pickle.dumps(invite())
