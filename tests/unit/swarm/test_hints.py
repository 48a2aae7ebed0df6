from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pals.errors import InvalidRecord
from pals.swarm.hints import (
    MAX_ADDRESSES,
    MAX_CLOCK_SKEW_S,
    Contacts,
    open_hint,
    open_usable_hints,
    sign_hint,
)
from pals.swarm.identity import Identity
from pals.types import PeerId, SwarmId
from tests.unit.swarm.chains import NOW, identity

SWARM = SwarmId(b"s" * 32)
P = identity(3)
ADDRESS = "/ip4/10.0.0.5/tcp/4001"


def hint(*addresses: str, at: int = NOW, swarm_id: SwarmId = SWARM, by: Identity = P) -> bytes:
    return sign_hint(by, swarm_id=swarm_id, addresses=addresses, issued_at=at)


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


# --- whom to try ---------------------------------------------------------------------


def read(*hints: bytes, now: float = NOW) -> list[PeerId]:
    return [h.peer for h in open_usable_hints(hints, swarm_id=SWARM, now_unix=now)]


def test_a_bad_hint_hides_no_other() -> None:
    good = [hint(ADDRESS, by=identity(number)) for number in (4, 5)]
    assert read(good[0], b"\x91", good[1]) == [identity(4).peer_id, identity(5).peer_id]


def test_what_the_backend_takes_is_read_by_a_machine_whose_clock_is_behind_its() -> None:
    ahead = hint(ADDRESS, at=NOW + MAX_CLOCK_SKEW_S)
    assert read(ahead, now=NOW - MAX_CLOCK_SKEW_S) == [P.peer_id]
    assert read(ahead, now=NOW - MAX_CLOCK_SKEW_S - 1) == []


def contacts_of(*numbers: int, named: tuple[int, ...] = ()) -> tuple[Contacts, list[PeerId]]:
    """Return contacts whose hints are the newer the higher their number is."""
    contacts = Contacts({identity(n).peer_id: (ADDRESS,) for n in named})
    for number in numbers:
        learn(contacts, number)
    return contacts, [identity(n).peer_id for n in numbers]


def learn(contacts: Contacts, number: int, address: str = ADDRESS) -> None:
    data = hint(address, at=NOW + number, by=identity(number))
    contacts.learn(open_hint(data, swarm_id=SWARM, now_unix=NOW))


def test_the_newest_hints_are_tried_first_and_only_of_those_wanted() -> None:
    contacts, (a, b, c) = contacts_of(3, 4, 5)
    assert contacts.choose({a, b, c}, 2) == [c, b]
    assert contacts.choose({a, b, identity(9).peer_id}, 9) == [b, a]


def test_those_found_dead_go_last_and_come_round_again() -> None:
    contacts, (a, b, c) = contacts_of(3, 4, 5)
    contacts.failed(c)
    assert contacts.choose({a, b, c}, 3) == [b, a, c]
    for peer in (a, b, b):
        contacts.failed(peer)
    assert contacts.choose({a, b, c}, 3) == [c, a, b]
    contacts.reached(b)
    assert contacts.choose({a, b, c}, 1) == [b]


def test_new_addresses_of_a_dead_peer_are_tried_anew_and_old_ones_are_not() -> None:
    contacts, (a, b) = contacts_of(3, 4)
    contacts.failed(b)
    learn(contacts, 4)
    assert contacts.choose({a, b}, 1) == [a]
    learn(contacts, 4, "/ip4/10.0.0.9/tcp/4001")
    assert contacts.choose({a, b}, 1) == [b]


def test_a_peer_that_the_user_names_goes_first_at_all_its_addresses() -> None:
    contacts, (a, b) = contacts_of(3, 4, named=(3,))
    learn(contacts, 3, "/ip4/10.0.0.9/tcp/4001")
    assert contacts.choose({a, b}, 2) == [a, b]
    assert contacts.addresses(a) == (ADDRESS, "/ip4/10.0.0.9/tcp/4001")


def test_a_remembered_peer_is_tried_where_it_was() -> None:
    contacts, (a,) = contacts_of(3)
    b = identity(9).peer_id
    contacts.remember(b, (ADDRESS,), at=NOW + 9)
    assert contacts.choose({a, b}, 2) == [b, a]
    assert contacts.addresses(b) == (ADDRESS,)


def test_the_latest_of_hint_and_memory_goes_first() -> None:
    contacts, (a,) = contacts_of(3)
    moved = "/ip4/10.0.0.9/tcp/4001"
    contacts.remember(a, (moved,), at=NOW)
    assert contacts.addresses(a) == (ADDRESS, moved)
    contacts.remember(a, (moved,), at=NOW + 60)
    assert contacts.addresses(a) == (moved, ADDRESS)


def test_an_older_memory_replaces_no_newer_one_and_makes_up_for_no_failure() -> None:
    contacts, (a, b) = contacts_of(3, 4)
    contacts.remember(b, (ADDRESS,), at=NOW + 60)
    contacts.failed(b)
    contacts.remember(b, ("/ip4/10.0.0.9/tcp/4001",), at=NOW + 59)
    assert contacts.addresses(b) == (ADDRESS,)
    assert contacts.choose({a, b}, 1) == [a]
    contacts.remember(b, ("/ip4/10.0.0.9/tcp/4001",), at=NOW + 61)
    assert contacts.choose({a, b}, 1) == [b]
