from __future__ import annotations

import pytest

from pals.swarm.addresses import host_in, is_peer_address, peer_address_problem, peer_in_address
from pals.swarm.invite import backend_url_problem
from tests.unit.swarm.chains import identity

PEER = identity(3).peer_id


@pytest.mark.parametrize(
    "address",
    [
        f"/ip4/203.0.113.7/tcp/8471/p2p/{PEER}",
        f"/ip6/2001:db8::1/tcp/8471/p2p/{PEER}",
        f"/dns4/pals.example.org/tcp/65535/p2p/{PEER}",
    ],
)
def test_a_multiaddr_that_names_a_peer_is_an_address(address):
    assert is_peer_address(address)
    assert peer_address_problem(address) is None
    assert backend_url_problem(address) is None
    assert peer_in_address(address) == PEER
    assert host_in(address) in ("203.0.113.7", "2001:db8::1", "pals.example.org")


@pytest.mark.parametrize(
    ("address", "problem"),
    [
        ("/ip4/203.0.113.7/tcp/8471", "form"),
        (f"/ip4/203.0.113.7/udp/8471/p2p/{PEER}", "form"),
        (f"/ip4/203.0.113.7/tcp/65536/p2p/{PEER}", "form"),
        (f"/ip4/203.0.113.7/tcp/0/p2p/{PEER}", "form"),
        (f"/ip4/203.0.113.7/tcp/8471/p2p/{PEER}/p2p-circuit", "form"),
        (f"/ip4/203.0.113.7/tcp/8471/p2p/{PEER}\n", "id"),
        (f"/ip4/2001:db8::1/tcp/8471/p2p/{PEER}", "host"),
        (f"/ip4/0.0.0.0/tcp/8471/p2p/{PEER}", "host"),
        (f"/ip6/fe80::1%eth0/tcp/8471/p2p/{PEER}", "host"),
        (f"/dns/-x y/tcp/8471/p2p/{PEER}", "host"),
        ("/ip4/203.0.113.7/tcp/8471/p2p/QmNobody", "id"),
        (f"/ip4/203.0.113.7/tcp/8471/p2p/{PEER[:-1]}0", "id"),
    ],
)
def test_anything_else_is_said_to_be_wrong(address, problem):
    assert problem in (peer_address_problem(address) or "")
    assert backend_url_problem(address) is not None


def test_an_address_that_is_too_long_is_refused_whatever_its_kind():
    for address in (f"/dns4/{'a' * 250}/tcp/1/p2p/{PEER}", f"http://{'a' * 260}.example"):
        assert "characters long" in (backend_url_problem(address) or "")
