"""The gate: strangers and former members get a closed connection, and nothing else."""

from __future__ import annotations

import pytest
import trio
from libp2p import new_host
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.peer.id import ID
from multiaddr import Multiaddr

from pals.errors import PeerUnreachable
from pals.net.host import Host, open_host
from tests.integration.net.harness import ECHO, LISTEN, ask_echo, identity, open_hosts, until

pytestmark = pytest.mark.trio


async def test_a_stranger_with_a_valid_identity_is_closed_out():
    async with open_hosts(1) as (_, (server,)):
        served = []
        server.handle(ECHO, served.append)
        stranger = identity(77)
        async with open_host(stranger, listen=LISTEN, allow=lambda _: True) as outsider:
            await _refused(outsider, server)
        assert not served
        assert not server.connected_peers()


async def test_a_member_taken_off_the_list_is_cut_and_cannot_come_back():
    async with open_hosts(1) as (members, (server,)):
        leaver = identity(2)
        members.add(leaver.peer_id)
        async with open_host(leaver, listen=LISTEN, allow=lambda _: True) as client:
            await client.connect(server.peer_id, server.addresses())
            stream = await client.open_stream(server.peer_id, ECHO)
            members.discard(leaver.peer_id)
            await server.drop_peer(leaver.peer_id)
            assert not server.connected_peers()
            with trio.fail_after(5), pytest.raises(PeerUnreachable):
                await stream.read_exactly(1)
            await until(lambda: not client.connected_peers())
            await _refused(client, server)


async def test_nothing_new_is_served_on_a_connection_that_outlives_a_membership() -> None:
    async with open_hosts(2) as (members, [client, server]):
        await client.connect(server.peer_id, server.addresses())
        running = await client.open_stream(server.peer_id, ECHO)
        await running.write(b"before")
        assert await running.read_exactly(6) == b"before"
        members.discard(client.peer_id)  # as when a list expires: what runs may end in its time
        await running.write(b"after")
        assert await running.read_exactly(5) == b"after"
        with pytest.raises(PeerUnreachable):
            await ask_echo(client, server)


async def test_a_member_removed_during_its_handshake_does_not_get_in():
    async with open_hosts(2) as (_, (client, server)):
        answers = iter([True, False])  # to the Noise gate, then at registration
        server._swarm.allow = lambda _: next(answers, False)
        server._swarm.upgrader.security_multistream.transports[
            "/noise"
        ]._allow = server._swarm.allow
        await _refused(client, server)
        assert not server.connected_peers()


async def test_a_host_does_not_dial_who_is_no_member():
    async with open_hosts(1) as (_, (client,)):
        stranger = identity(77)
        async with open_host(stranger, listen=LISTEN, allow=lambda _: True) as server:
            with pytest.raises(PeerUnreachable, match="not a live member"):
                await client.connect(server.peer_id, server.addresses())
            with pytest.raises(PeerUnreachable, match="not a live member"):
                await client.open_stream(server.peer_id, ECHO)
            assert not server.connected_peers()


async def test_one_peer_s_connections_are_limited():
    async with open_hosts(2) as (_, (_, server)):
        member = new_host(key_pair=create_new_key_pair(identity(1).reveal_seed()))
        async with member.run([]):
            target = ID.from_base58(server.peer_id)
            address = Multiaddr(server.addresses()[0])
            for _ in range(4):
                await member.get_network().dial_addr(address, target)
            await member.get_network().dial_addr(address, target)
            await until(lambda: len(server._swarm.connections) == 1)
            assert len(server._swarm.live_connections(ID.from_base58(identity(1).peer_id))) == 4
            await member.close()


async def _refused(client: Host, server: Host) -> None:
    """Assert that nothing of ``client`` is served, whether or not its dial looks good.

    Noise's last message is the dialler's, so it may see the closing only afterwards.
    """

    async def connect_and_ask():
        await client.connect(server.peer_id, server.addresses())
        await ask_echo(client, server)

    with pytest.raises(PeerUnreachable):
        await connect_and_ask()
