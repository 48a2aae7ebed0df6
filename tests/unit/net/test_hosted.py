from __future__ import annotations

import os

import pytest

from pals.config import Profile
from pals.errors import InvalidConfig, ProfileExposed
from pals.net.backend_local import LocalBackend
from pals.net.backends import hinted_peers, members_address, open_backend
from pals.net.hosted import (
    MEMBERS_PORT,
    invite_address,
    is_hosted_here,
    listen_as_host,
    load_door_addresses,
    load_door_identity,
    own_backend_address,
    save_door_addresses,
)
from pals.net.membership import MembershipClient
from pals.settings import NodeSettings
from pals.swarm.hints import AddressHint
from pals.swarm.identity import load_or_create_identity
from tests.unit.swarm.chains import NOW, Chain, identity

URL = "http://127.0.0.1:8470"


@pytest.fixture
def profile(tmp_path):
    return Profile(tmp_path / "profile")


def door_at(ip, profile):
    return f"/ip4/{ip}/tcp/8471/p2p/{load_door_identity(profile.path).peer_id}"


def test_a_profile_knows_its_own_backend_and_no_other(profile):
    address = own_backend_address(profile)
    own = load_or_create_identity(profile)

    assert is_hosted_here(address, own)
    assert not is_hosted_here(address, identity(5))
    assert not is_hosted_here(URL, own)
    assert isinstance(open_backend(address, profile), LocalBackend)
    assert isinstance(open_backend(URL, profile), MembershipClient)


def test_an_invite_states_where_the_door_was_last(profile):
    address, own = own_backend_address(profile), load_or_create_identity(profile)
    far, near, docker = (door_at(ip, profile) for ip in ("10.0.0.2", "127.0.0.1", "172.17.0.1"))
    save_door_addresses(profile, [near, docker, far])

    assert load_door_addresses(profile) == (far, docker, near)
    assert invite_address(profile, own, address, None) == far


def test_an_address_that_the_user_gives_is_completed(profile):
    address, own = own_backend_address(profile), load_or_create_identity(profile)

    given = invite_address(profile, own, address, "/ip4/203.0.113.7/tcp/8471")

    assert given == door_at("203.0.113.7", profile)
    assert invite_address(profile, own, address, given) == given


def test_an_invite_needs_a_door_that_was_open_once(profile):
    address, own = own_backend_address(profile), load_or_create_identity(profile)
    with pytest.raises(InvalidConfig, match="no server has run"):
        invite_address(profile, own, address, None)


def test_an_invite_of_another_backend_states_its_own_address(profile):
    own_backend_address(profile)
    own = load_or_create_identity(profile)
    assert invite_address(profile, own, URL, None) == URL
    assert invite_address(profile, own, URL, "http://10.0.0.1:1") == "http://10.0.0.1:1"


def test_the_door_has_an_identity_of_its_own_that_nobody_else_may_read(profile):
    own_backend_address(profile)
    door = load_door_identity(profile.path)

    assert door.peer_id == load_door_identity(profile.path).peer_id
    assert door.peer_id != load_or_create_identity(profile).peer_id
    os.chmod(profile.path / "redeem.key", 0o644)
    with pytest.raises(ProfileExposed):
        load_door_identity(profile.path)


def test_lines_that_are_no_addresses_are_left_out_of_what_is_remembered(profile):
    own_backend_address(profile)
    door = door_at("10.0.0.2", profile)
    save_door_addresses(profile, ["/ip4/10.0.0.2/tcp/8471", door])
    assert load_door_addresses(profile) == (door,)


def test_a_node_that_hosts_keeps_its_port_unless_it_is_given_one():
    assert listen_as_host(NodeSettings()).listen == f"/ip4/0.0.0.0/tcp/{MEMBERS_PORT}"
    chosen = NodeSettings(listen="/ip4/127.0.0.1/tcp/0")
    assert listen_as_host(chosen) is chosen


# --- what a new member goes by -------------------------------------------------------


def hint_of(peer, *addresses):
    return AddressHint(swarm_id=bytes(32), key=peer.public_key, addresses=addresses, issued_at=NOW)


def test_a_new_member_asks_the_member_that_the_operator_appointed():
    chain = Chain()
    founder, door = chain.founder, f"/ip4/10.0.0.1/tcp/8471/p2p/{identity(9).peer_id}"
    own = f"/ip4/10.0.0.1/tcp/8472/p2p/{founder.peer_id}"
    foreign = f"/ip4/10.0.0.1/tcp/8472/p2p/{identity(9).peer_id}"
    hints = [hint_of(identity(7), foreign), hint_of(founder, "/junk", foreign, own)]

    assert members_address(door, chain.roster(), hints) == door
    chain.append(chain.appoint(founder.public_key, "backend"))
    assert members_address(door, chain.roster(), hints) == own
    assert members_address(door, chain.roster(), hints[:1]) == door
    assert members_address(URL, chain.roster(), hints) == URL


def test_only_live_members_are_remembered_from_hints():
    chain = Chain()
    roster = chain.roster()
    hints = [
        hint_of(chain.founder, "/ip4/10.0.0.1/tcp/1"),
        hint_of(identity(7), "/ip4/1.1.1.1/tcp/1"),
    ]

    known = hinted_peers([*hints, hint_of(chain.founder)], roster)

    assert [(peer.peer, peer.addresses) for peer in known] == [
        (chain.founder.peer_id, ("/ip4/10.0.0.1/tcp/1",))
    ]
