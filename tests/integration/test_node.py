"""Members over a real backend and real libp2p whose clocks and lists misbehave."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
import trio
import trio.testing

from pals.config import KnownPeer
from pals.driver.sessions import SessionClient
from pals.errors import NoChain, PalsError
from pals.net import announcer, keeper
from pals.net.announce import MAX_ADDRESSES
from pals.net.host import Host
from pals.net.membership import MembershipClient
from pals.net.node import NodeOptions, open_node
from pals.swarm.allowlist import MAX_STALE_S
from pals.types import SwarmId
from tests.integration.net.harness import until
from tests.integration.swarm import ask, make_swarm, open_client, request, start_shard

UNREACHABLE_URL = "http://127.0.0.1:9"

pytestmark = [pytest.mark.trio, pytest.mark.timeout(120)]


async def test_a_clock_that_steps_back_does_not_end_a_shard(
    tmp_path: Path, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(
        offset_s=0.0, time=lambda: time.time() + clock.offset_s, perf_counter=time.perf_counter
    )
    monkeypatch.setattr(announcer, "time", clock)
    monkeypatch.setattr(announcer, "ANNOUNCE_SOON_S", 0.1)
    async with make_swarm(tmp_path, count=2) as swarm:
        first, second = swarm.peers
        meeting = await start_shard(nursery, swarm, swarm.options(first), "0:3")
        shard = await start_shard(nursery, swarm, swarm.options(second), "3:6")
        own = shard.node.peer_id

        async def seen() -> int:
            found = await meeting.node.discovery.find((own,), deadline_s=5.0)
            return found[own].seq

        before = await seen()
        clock.offset_s = -100.0
        with trio.fail_after(10):
            while (after := await seen()) == before:
                await trio.testing.wait_all_tasks_blocked(0.05)
        shard.scope.cancel()
        await shard.finished.wait()
        clock.offset_s = -130.0
        await until(lambda: own not in meeting.node.host.connected_peers())
        again = await start_shard(nursery, swarm, swarm.options(second), "3:6")
        restarted = await seen()
        assert not again.finished.is_set()
        nursery.cancel_scope.cancel()

    assert before < after < restarted


async def test_a_host_with_many_bridges_serves_and_announces_the_useful_addresses(
    tmp_path: Path, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    bridges = tuple(f"/ip4/172.{17 + i}.0.1/tcp/4001" for i in range(15))
    lan = ("/ip4/192.168.1.2/tcp/4001", "/ip4/10.0.0.2/tcp/4001")
    monkeypatch.setattr(Host, "addresses", lambda self: (*bridges, *lan))
    async with make_swarm(tmp_path, count=1) as swarm:
        shard = await start_shard(nursery, swarm, swarm.options(swarm.peers[0]), "0:6")
        own = shard.node.peer_id
        found = await shard.node.discovery.find((own,), deadline_s=5.0)
        nursery.cancel_scope.cancel()

    assert found[own].addresses == (*lan, *bridges[: MAX_ADDRESSES - len(lan)])


async def test_an_expired_list_cuts_running_sessions_and_recovers_with_the_backend(
    tmp_path: Path, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one whose list expires cuts; that of the other is fresh all the time."""
    monkeypatch.setattr(keeper, "DRAIN_S", 0.01)
    monkeypatch.setattr(keeper, "EXPIRY_INTERVAL_S", 0.01)
    async with make_swarm(tmp_path, count=1) as swarm:
        shard = await start_shard(
            nursery, swarm, swarm.options(swarm.peers[0], poll_interval_s=1e6), "0:6"
        )
        async with open_client(swarm) as client:
            answer = await ask(client, request([5, 9, 200, 31], count=80))
            await answer.next_token()
            allow_list, host = shard.node.allow_list, shard.node.host
            roster = allow_list.roster
            assert roster is not None
            monkeypatch.setattr(allow_list, "_verified_at", trio.current_time() - MAX_STALE_S)
            with pytest.raises(NoChain):
                await answer.all_tokens()
            await until(lambda: not host.connected_peers())
            with pytest.raises(NoChain):
                await ask(client, request([5, 9, 200, 31]))
            allow_list.update(roster, trio.current_time(), age_s=0.0)
            with trio.fail_after(30):
                tokens: list[int] = []
                while not tokens:  # the members meet again some seconds later
                    tokens = await answer_again(client)
                    await trio.sleep(0.05)
        assert len(tokens) == 12
        assert not shard.finished.is_set()
        nursery.cancel_scope.cancel()


async def answer_again(client: SessionClient) -> list[int]:
    try:
        return await (await ask(client, request([5, 9, 200, 31]))).all_tokens()
    except PalsError:
        return []


async def test_a_bad_hint_of_the_backend_hides_no_other(
    tmp_path: Path, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch = MembershipClient.fetch_hints

    async def damage(self: MembershipClient, swarm_id: SwarmId) -> tuple[bytes, ...]:
        return (b"damaged", *await fetch(self, swarm_id))

    async with make_swarm(tmp_path, count=1) as swarm:
        shard = await start_shard(nursery, swarm, swarm.options(swarm.peers[0]), "0:6")
        monkeypatch.setattr(MembershipClient, "fetch_hints", damage)
        async with open_node(swarm.options(swarm.operator)) as node:
            assert node.host.connected_peers() == {shard.node.peer_id}
        nursery.cancel_scope.cancel()


async def test_members_met_before_are_found_without_backend_and_options(tmp_path: Path) -> None:
    async with make_swarm(tmp_path, count=1) as swarm:
        operator, peer = swarm.options(swarm.operator), swarm.options(swarm.peers[0])
        async with open_node(operator) as node:
            async with open_node(peer):
                await until(lambda: bool(remembered(peer)))
            peer = replace(
                peer, entry=msgspec.structs.replace(peer.entry, backend_url=UNREACHABLE_URL)
            )
            async with open_node(peer) as again:
                assert again.host.connected_peers() == {node.peer_id}


async def test_damaged_memory_of_members_stops_no_node(tmp_path: Path) -> None:
    async with make_swarm(tmp_path, count=1) as swarm:
        operator, peer = swarm.options(swarm.operator), swarm.options(swarm.peers[0])
        peer.profile.save_known_peers(peer.swarm_id.hex(), [])
        path = peer.profile.swarm_folder(peer.swarm_id.hex()) / "known_peers.json"
        path.write_bytes(b"damaged")
        async with open_node(operator) as node, open_node(peer) as again:
            assert again.host.connected_peers() == {node.peer_id}
            await until(lambda: path.read_bytes() != b"damaged")
            assert [known.peer for known in remembered(peer)] == [node.peer_id]


def remembered(options: NodeOptions) -> tuple[KnownPeer, ...]:
    return options.profile.load_known_peers(options.swarm_id.hex())


async def test_a_member_that_lost_everybody_meets_them_again_at_once(tmp_path: Path) -> None:
    async with make_swarm(tmp_path, count=1) as swarm:
        operator, peer = swarm.options(swarm.operator), swarm.options(swarm.peers[0])
        async with open_node(operator) as node, open_node(peer) as other:
            lost = trio.Event()
            node.host.on_disconnect(lambda _: lost.set())
            await node.host.drop_peer(other.peer_id)
            await lost.wait()
            await until(lambda: node.host.connected_peers() == {other.peer_id}, deadline_s=15.0)
