"""A member is reached at whichever of its addresses works: a name, IPv4 or IPv6."""

from __future__ import annotations

import socket

import pytest
import trio
from multiaddr import Multiaddr

from pals.errors import PeerUnreachable
from pals.net._libp2p import MAX_ADDRESSES_PER_NAME, resolve_address
from pals.net.announce import MAX_ADDRESSES
from pals.net.host import Host, open_host
from tests.integration.net.harness import Members, ask_echo, echo, identity, open_hosts

pytestmark = pytest.mark.trio


def port_of(host: Host) -> str:
    return host.addresses()[0].split("/")[4]


@pytest.mark.parametrize("name", ["/dns4/localhost", "/dns/localhost", "/ip4/127.0.0.1"])
async def test_a_member_is_reached_by_name_or_number(name: str):
    async with open_hosts(2) as (_, (client, server)):
        await client.connect(server.peer_id, [f"{name}/tcp/{port_of(server)}"])
        assert await ask_echo(client, server) == b"hello"


@pytest.mark.parametrize("listen", ["/ip6/::1/tcp/0", "/ip6/::/tcp/0"])
async def test_a_member_that_listens_on_ipv6_is_reached(listen: str):
    if not has_ipv6():
        pytest.skip("this machine has no IPv6 loopback")
    members = Members(identity(n).peer_id for n in (1, 2))
    async with (
        open_host(identity(1), listen=listen, allow=members.allow) as server,
        open_host(identity(2), listen="/ip4/127.0.0.1/tcp/0", allow=members.allow) as client,
    ):
        server.handle("/test/echo/1", echo)
        await client.connect(server.peer_id, [f"/ip6/::1/tcp/{port_of(server)}"])
        assert await ask_echo(client, server) == b"hello"


async def test_dead_addresses_before_the_good_one_cost_no_time():
    """Refused, silent, unresolvable and unreachable ones; stock tries the first alone."""
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    silent = listeners[0].socket.getsockname()[1]  # takes a connection and says nothing
    dead = [
        "/ip4/127.0.0.1/tcp/1",
        f"/ip4/127.0.0.1/tcp/{silent}",
        "/dns4/nowhere.invalid/tcp/4001",
        "/ip6/::1/tcp/1",
        "/ip4/192.0.2.1/tcp/4001",
    ]
    async with open_hosts(2) as (_, (client, server)):
        with trio.fail_after(3):
            await client.connect(server.peer_id, [*dead, *server.addresses()])
        await listeners[0].aclose()


async def test_the_last_of_all_the_addresses_that_an_announcement_holds_is_tried():
    async with open_hosts(2) as (_, (client, server)):
        dead = [f"/ip4/127.0.0.1/tcp/{port}" for port in range(1, MAX_ADDRESSES)]
        await client.connect(server.peer_id, [*dead, *server.addresses()])


async def test_a_name_that_stands_for_nothing_is_unreachable():
    async with open_hosts(2) as (_, (client, server)):
        with pytest.raises(PeerUnreachable):
            await client.connect(server.peer_id, ["/dns4/nowhere.invalid/tcp/4001"])


async def test_a_name_stands_for_a_few_addresses_at_most(monkeypatch: pytest.MonkeyPatch):
    async def many(host: str, port: str, **_: object) -> list[tuple]:
        await trio.lowlevel.checkpoint()
        found = [(socket.AF_INET, 0, 0, "", (f"192.0.2.{n}", int(port))) for n in range(50)]
        return [*found, (socket.AF_INET6, 0, 0, "", ("fe80::1%eth0", int(port), 0, 2))]

    monkeypatch.setattr(trio.socket, "getaddrinfo", many)
    resolved = await resolve_address(Multiaddr("/dns/pals.example/tcp/4001"))
    assert [str(at) for at in resolved] == [
        f"/ip4/192.0.2.{n}/tcp/4001" for n in range(MAX_ADDRESSES_PER_NAME)
    ]


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True
