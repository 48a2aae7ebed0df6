from __future__ import annotations

import pytest

from pals.errors import InvalidConfig
from pals.net.nat.addresses import (
    Endpoint,
    endpoints_in,
    is_inside,
    meeting_address,
    meeting_peers,
    read_announced,
)
from pals.types import PeerId

A, B, C, D, E = (PeerId(name) for name in "ABCDE")


@pytest.mark.parametrize(
    ("text", "endpoint"),
    [
        ("/ip4/203.0.113.7/tcp/4001", Endpoint("203.0.113.7", 4001)),
        ("/ip4/203.0.113.7/tcp/4001/p2p/12D3Koo", Endpoint("203.0.113.7", 4001)),
        ("/ip6/2001:DB8:0::1/tcp/1", Endpoint("2001:db8::1", 1)),
        ("/ip6/::ffff:203.0.113.7/tcp/1", Endpoint("203.0.113.7", 1)),
    ],
)
def test_an_endpoint_is_read_into_its_one_form(text, endpoint):
    assert Endpoint.parse(text) == endpoint


@pytest.mark.parametrize(
    "text",
    [
        "",
        "203.0.113.7:4001",
        "/ip4/203.0.113.7/tcp/0",
        "/ip4/203.0.113.7/tcp/65536",
        "/ip4/203.0.113.7/tcp/04001",
        "/ip4/203.0.113/tcp/4001",
        "/ip4/::1/tcp/4001",
        "/ip6/203.0.113.7/tcp/4001",
        "/ip4/203.0.113.7/udp/4001",
        "/dns4/example.org/tcp/4001",
        "/ip4/203.0.113.7/tcp/4001/p2p/A/p2p-circuit/p2p/B",
        "/ip4/203.0.113.7/tcp/4001\n",
    ],
)
def test_what_is_no_endpoint_is_refused(text):
    with pytest.raises(ValueError):
        Endpoint.parse(text)


def test_an_endpoint_is_told_as_a_multiaddr():
    assert str(Endpoint("203.0.113.7", 1)) == "/ip4/203.0.113.7/tcp/1"
    assert str(Endpoint("2001:db8::1", 1)) == "/ip6/2001:db8::1/tcp/1"


def test_a_zone_is_not_part_of_an_address():
    assert Endpoint.of("fe80::1%eth0", 1) == Endpoint("fe80::1", 1)


@pytest.mark.parametrize(
    ("ip", "inside"),
    [
        ("10.1.2.3", True),
        ("172.31.0.1", True),
        ("192.168.1.1", True),
        ("100.64.0.1", True),
        ("127.0.0.1", True),
        ("169.254.1.1", True),
        ("fe80::1", True),
        ("fd00::1", True),
        ("::1", True),
        ("172.32.0.1", False),
        ("100.128.0.1", False),
        ("203.0.113.7", False),
        ("2001:db8::1", False),
    ],
)
def test_addresses_of_one_network_are_told_from_those_of_all(ip, inside):
    assert is_inside(ip) == inside


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("/ip4/203.0.113.7/tcp/4001", "/ip4/203.0.113.7/tcp/4001"),
        ("/ip6/2001:db8:0::1/tcp/4001/p2p/A", "/ip6/2001:db8::1/tcp/4001"),
        ("/dns4/home.example.org/tcp/4001", "/dns4/home.example.org/tcp/4001"),
        ("/ip4/10.0.0.3/tcp/4001", "/ip4/10.0.0.3/tcp/4001"),
    ],
)
def test_an_announced_address_is_read(text, read):
    assert read_announced(text) == read


@pytest.mark.parametrize(
    "text",
    [
        "203.0.113.7:4001",
        "/ip4/0.0.0.0/tcp/4001",
        "/ip6/::/tcp/4001",
        "/dns4/-bad/tcp/4001",
        "/dns4/home.example.org/tcp/70000",
        "/ip4/300.0.0.1/tcp/1",
        "x" * 1000,
    ],
)
def test_an_announced_address_that_nobody_can_dial_is_refused(text):
    with pytest.raises(InvalidConfig) as caught:
        read_announced(text)

    assert len(str(caught.value)) < 400


def test_meeting_places_are_read_for_the_peer_itself_and_only_a_few():
    addresses = [
        "/ip4/203.0.113.7/tcp/4001",
        meeting_address(A, B),
        meeting_address(A, C),
        meeting_address(B, B),
        *(meeting_address(m, B) for m in (A, C, D, E)),
    ]

    assert meeting_peers(addresses, B) == (A, C, D)


def test_endpoints_are_read_once_and_the_rest_is_passed_over():
    one = "/ip4/203.0.113.7/tcp/4001"

    assert endpoints_in([one, "junk", meeting_address(A, B), one]) == (Endpoint.parse(one),)
