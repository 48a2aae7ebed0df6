"""P1 to P4: who is no member, or says that it is, gets nothing; and gets nothing to read."""

from __future__ import annotations

import pickle
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.lowlevel
from libp2p import new_host
from libp2p.abc import INetStream
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.exceptions import BaseLibp2pError
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import info_from_p2p_addr
from libp2p.security.insecure.transport import PLAINTEXT_PROTOCOL_ID, InsecureTransport
from libp2p.security.secio import transport as secio
from multiaddr import Multiaddr

from pals.errors import PeerUnreachable
from pals.net.announce import sign_announcement
from pals.net.host import Host, open_host
from pals.net.node import Node, open_node
from pals.swarm.identity import Identity, load_or_create_identity
from tests.announcements import make_announcement
from tests.integration.net.harness import ECHO, LISTEN, identity, open_hosts, until
from tests.integration.swarm import TestSwarm, make_swarm

pytestmark = [pytest.mark.trio, pytest.mark.timeout(120)]


class Payload:
    """What runs when somebody unpickles it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


@asynccontextmanager
async def victim(folder: Path) -> AsyncIterator[tuple[TestSwarm, Node]]:
    """Run one real member of a swarm of two."""
    async with (
        make_swarm(folder, count=1, num_layers=1) as swarm,
        open_node(swarm.options(swarm.operator)) as node,
    ):
        yield swarm, node


def protocols(node: Node) -> list[str]:
    return sorted(str(p) for p in node.host.libp2p_host.get_mux().get_protocols() if p)


async def test_p1_a_pickle_to_every_protocol_runs_nothing(tmp_path: Path) -> None:
    evidence = tmp_path / "ran"
    attack = pickle.dumps(Payload(evidence))
    async with victim(tmp_path) as (swarm, node):
        member = load_or_create_identity(swarm.peers[0])
        async with open_host(member, listen=LISTEN, allow=lambda _: True) as attacker:
            await attacker.connect(node.peer_id, node.host.addresses())
            served = protocols(node)
            assert len(served) >= 8
            for protocol in served:
                await send(attacker, node, protocol, attack)
                await send(attacker, node, protocol, len(attack).to_bytes(4, "big") + attack)
            await until(lambda: attacker.peer_id in node.host.connected_peers())
    assert not evidence.exists()
    pickle.loads(attack)
    assert evidence.exists()  # what was sent does run where it is unpickled


async def send(attacker: Host, node: Node, protocol: str, data: bytes) -> None:
    """Send bytes on a stream of their own, whatever becomes of them."""
    try:
        stream = await attacker.open_stream(node.peer_id, protocol)
        await stream.write(data)
        await stream.close()
        with trio.move_on_after(0.2):
            await stream.read_some(100)
        await stream.reset()
    except PeerUnreachable:
        pass


async def test_p2_a_stranger_is_refused_on_every_protocol(tmp_path: Path) -> None:
    async with victim(tmp_path) as (_, node):
        for protocol in [*protocols(node), "/ipfs/ping/1.0.0", "/ipfs/id/1.0.0"]:
            async with open_host(identity(77), listen=LISTEN, allow=lambda _: True) as stranger:
                with pytest.raises(PeerUnreachable):
                    await connect_and_read(stranger, node.host, protocol)
        assert not node.host.connected_peers()


async def connect_and_read(client: Host, server: Host, protocol: str) -> None:
    await client.connect(server.peer_id, server.addresses())
    stream = await client.open_stream(server.peer_id, protocol)
    await stream.write(b"hello")
    if not await stream.read_some(1):
        raise PeerUnreachable(peer=server.peer_id, problem="closed")


@pytest.mark.parametrize("protocol", ["plaintext", "secio"])
async def test_p3_stating_a_member_s_id_over_another_transport_is_refused(protocol):
    """py-libp2p offers plaintext by itself, where anybody is whoever they say."""
    async with open_hosts(2) as (_, (victim, server)):
        key_pair = create_new_key_pair(identity(1).reveal_seed())
        assert ID.from_pubkey(key_pair.public_key).to_base58() == victim.peer_id
        transports = {
            "plaintext": {PLAINTEXT_PROTOCOL_ID: InsecureTransport(key_pair)},
            "secio": {secio.ID: secio.Transport(key_pair)},
        }
        attacker = new_host(key_pair=key_pair, sec_opt=transports[protocol])
        async with attacker.run([]):
            with pytest.raises(BaseLibp2pError):
                await attacker.get_network().dial_addr(
                    Multiaddr(server.addresses()[0]), ID.from_base58(server.peer_id)
                )
        assert not server.connected_peers()


async def test_p3_the_attacker_s_stack_gets_in_with_noise():
    """The control for the test above: only the transport makes the difference."""
    async with open_hosts(2) as (_, (_, server)):
        member = new_host(key_pair=create_new_key_pair(identity(1).reveal_seed()))
        async with member.run([]):
            await member.connect(info_from_p2p_addr(Multiaddr(server.addresses()[0])))
            stream: INetStream = await member.new_stream(ID.from_base58(server.peer_id), [ECHO])
            await stream.write(b"hello")
            assert await stream.read(5) == b"hello"
            await member.close()


async def test_p4_a_fake_server_with_perfect_announcements_is_not_even_dialled(
    tmp_path: Path,
) -> None:
    """Not a byte reaches who is not on the list, whatever it announces and wherever."""
    heard = bytearray()

    async def listen(stream: trio.SocketStream) -> None:
        async for data in stream:
            heard.extend(data)

    async with victim(tmp_path) as (_, node), trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, listen, listeners)
        fake = Identity.generate()
        address = f"/ip4/127.0.0.1/tcp/{listeners[0].socket.getsockname()[1]}"
        node.discovery.offer(perfect_announcement(fake, address))
        assert fake.peer_id not in node.discovery.announcements()
        with pytest.raises(PeerUnreachable, match="not a live member"):
            await node.links.ensure(fake.peer_id, [f"{address}/p2p/{fake.peer_id}"])
        nursery.cancel_scope.cancel()
    assert not heard


async def test_p4_a_fake_server_at_a_member_s_address_gets_no_further_than_noise(
    tmp_path: Path,
) -> None:
    async with victim(tmp_path) as (swarm, node):
        member = load_or_create_identity(swarm.peers[0]).peer_id
        async with open_host(identity(77), listen=LISTEN, allow=lambda _: True) as fake:
            served: list[object] = []

            async def serve(stream: object) -> None:
                served.append(stream)

            fake.handle("/pals/link", serve)
            addresses = [a.rpartition("/p2p/")[0] for a in fake.addresses()]
            with pytest.raises(PeerUnreachable):
                await node.links.ensure(member, addresses)
            assert not fake.connected_peers()
            assert not served


def perfect_announcement(server: Identity, address: str) -> bytes:
    announcement = make_announcement(
        server.peer_id, "0:1", addresses=(address,), expires_at=time.time() + 100, seq=99
    )
    return sign_announcement(server, announcement)
