"""Two members find each other by multicast DNS alone, and nobody else is met that way."""

from __future__ import annotations

import socket
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import trio
import trio.testing
from zeroconf import Zeroconf

from pals.net.mdns import Neighbour
from pals.net.node import NodeOptions, open_node
from tests.integration.net.harness import until
from tests.integration.swarm import make_swarm

pytestmark = [pytest.mark.trio, pytest.mark.timeout(120)]

GROUP = "224.0.0.251"


def multicast_problem() -> str:
    """Return why multicast DNS does not work here, or an empty text."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("", 0))
            group = socket.inet_aton(GROUP) + socket.inet_aton("0.0.0.0")
            probe.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, group)
            probe.settimeout(2.0)
            probe.sendto(b"pals", (GROUP, probe.getsockname()[1]))
            probe.recv(16)
    except OSError as error:
        return f"no multicast on this machine: {error}"
    return ""


def on_the_local_network(options: NodeOptions) -> NodeOptions:
    settings = msgspec.structs.replace(options.settings, mdns=True, upnp=False)
    return replace(options, settings=settings)


async def test_members_that_know_no_address_find_each_other(tmp_path: Path) -> None:
    if problem := multicast_problem():
        pytest.skip(problem)
    async with make_swarm(tmp_path, count=1, hints=False) as swarm:
        first = on_the_local_network(swarm.options(swarm.operator))
        second = on_the_local_network(swarm.options(swarm.peers[0]))
        async with open_node(first) as a, open_node(second) as b:
            await until(lambda: b.peer_id in a.host.connected_peers(), deadline_s=20.0)


async def test_what_the_local_network_says_of_strangers_and_liars_leads_nowhere(
    tmp_path: Path,
) -> None:
    async with make_swarm(tmp_path, count=2, hints=False) as swarm:
        first, second = swarm.options(swarm.operator), swarm.options(swarm.peers[0])
        async with open_node(first) as node, open_node(second) as other:
            stranger = Neighbour(peer="12D3KooWstranger", addresses=other.host.addresses())
            absent = swarm.options(swarm.peers[1]).identity.peer_id
            liar = Neighbour(peer=absent, addresses=other.host.addresses())
            with trio.fail_after(10):
                await node._bootstrap.hear(stranger)
                await node._bootstrap.hear(liar)
            assert node.host.connected_peers() == frozenset()
            true = Neighbour(peer=other.peer_id, addresses=other.host.addresses())
            await node._bootstrap.hear(true)
            assert node.host.connected_peers() == {other.peer_id}


async def test_nothing_is_said_on_the_local_network_unless_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = []
    monkeypatch.setattr(Zeroconf, "__init__", lambda self, *_: said.append(self))
    async with make_swarm(tmp_path, count=0) as swarm, open_node(swarm.options(swarm.operator)):
        await trio.testing.wait_all_tasks_blocked()
    assert not said
