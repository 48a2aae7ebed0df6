from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pals.errors import InvalidRecord
from pals.swarm.hints import MAX_ADDRESSES, MAX_CLOCK_SKEW_S, open_hint, sign_hint
from pals.types import SwarmId
from tests.unit.swarm.chains import NOW, identity

SWARM = SwarmId(b"s" * 32)
P = identity(3)
ADDRESS = "/ip4/10.0.0.5/tcp/4001"


def hint(*addresses: str, at: int = NOW, swarm_id: SwarmId = SWARM) -> bytes:
    return sign_hint(P, swarm_id=swarm_id, addresses=addresses, issued_at=at)


def test_hint_names_its_signer_and_addresses() -> None:
    opened = open_hint(hint(ADDRESS), swarm_id=SWARM, now_unix=NOW)
    assert opened.peer == P.peer_id
    assert opened.addresses == (ADDRESS,)


def test_surplus_addresses_are_left_out() -> None:
    opened = open_hint(hint(*[ADDRESS] * 20), swarm_id=SWARM, now_unix=NOW)
    assert len(opened.addresses) == MAX_ADDRESSES


def test_every_changed_byte_is_refused() -> None:
    data = hint(ADDRESS)
    for position in range(len(data)):
        damaged = bytearray(data)
        damaged[position] ^= 1
        with pytest.raises(InvalidRecord):
            open_hint(bytes(damaged), swarm_id=SWARM, now_unix=NOW)


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(InvalidRecord):
        open_hint(data, swarm_id=SWARM, now_unix=NOW)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(hint(ADDRESS, swarm_id=SwarmId(b"x" * 32)), id="other swarm"),
        pytest.param(hint(ADDRESS, at=NOW + MAX_CLOCK_SKEW_S + 1), id="from the future"),
        pytest.param(hint("/ip4/\x1b[2J"), id="terminal escape"),
        pytest.param(hint("/ip4/1.2.3.4/tcp/1\n"), id="line break"),
        pytest.param(hint("no multiaddr"), id="not a multiaddr"),
        pytest.param(hint("/" + "a" * 200), id="long address"),
        pytest.param(b"\x91" * 3000, id="too long"),
    ],
)
def test_improper_hint_is_refused(data: bytes) -> None:
    with pytest.raises(InvalidRecord):
        open_hint(data, swarm_id=SWARM, now_unix=NOW)
