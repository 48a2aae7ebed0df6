"""What members say of themselves on the local network, and what is believed of it."""

from __future__ import annotations

import pytest
from zeroconf import ServiceInfo

from pals.net.mdns import MAX_ADDRESSES, SERVICE, Neighbour, describe, read, swarm_tag
from pals.types import PeerId, SwarmId

SWARM = SwarmId(bytes(range(32)))
TAG = swarm_tag(SWARM)
PEER = PeerId("12D3KooWRqoTbKr9Whsm7ZAxvXLseK5BTEvqufqR8ateWfwmB52V")
ADDRESS = "/ip4/192.168.1.2/tcp/4001"


def test_what_a_member_says_is_read_back() -> None:
    addresses = (ADDRESS, "/ip6/fd00::2/tcp/4001")
    info = describe(TAG, PEER, addresses)
    assert read(info, TAG) == Neighbour(peer=PEER, addresses=addresses)
    assert info.port == 4001


def test_surplus_addresses_are_left_out() -> None:
    neighbour = read(describe(TAG, PEER, [ADDRESS] * 20), TAG)
    assert neighbour is not None
    assert len(neighbour.addresses) == MAX_ADDRESSES


def test_a_member_of_another_swarm_is_not_heard() -> None:
    other = swarm_tag(SwarmId(bytes(32)))
    assert read(describe(other, PEER, [ADDRESS]), TAG) is None


def test_the_tag_tells_nothing_of_the_swarm_id() -> None:
    assert TAG not in SWARM.hex()
    assert SWARM.hex()[: len(TAG)] != TAG


@pytest.mark.parametrize(
    "properties",
    [
        {},
        {"swarm": TAG, "a0": ADDRESS},
        {"swarm": TAG, "peer": PEER},
        {"swarm": TAG, "peer": "x" * 65, "a0": ADDRESS},
        {"peer": PEER, "a0": ADDRESS},
        {"swarm": TAG, "peer": b"\xff", "a0": ADDRESS},
        {"swarm": TAG, "peer": None, "a0": ADDRESS},
    ],
    ids=str,
)
def test_a_service_that_says_less_or_other_things_is_not_heard(properties) -> None:
    info = ServiceInfo(SERVICE, f"somebody.{SERVICE}", port=1, properties=properties)
    assert read(info, TAG) is None
