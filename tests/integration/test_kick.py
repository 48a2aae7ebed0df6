"""A kick in real time: real members, a running answer, and one that is thrown out."""

from __future__ import annotations

import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import trio

from pals.config import Profile
from pals.errors import PalsError, PeerUnreachable
from pals.net.node import Node, NodeOptions, open_node
from pals.net.removal import remove_peer, rotate
from pals.net.roster_exchange import SECRET_PROTOCOL
from pals.net.telling import announce_change
from pals.swarm.ledger import Ledger
from pals.types import PeerId
from tests.integration.net.harness import until
from tests.integration.swarm import TestSwarm, ask, make_swarm, open_client, request, start_shard

KICK_S = 3.0
NEVER_S = 86400.0
"""Nobody polls in these tests: what they show comes from member to member."""

pytestmark = [pytest.mark.trio, pytest.mark.timeout(180)]


def live_on(node: Node) -> None:
    """Let a member go on that was removed, as if its owner had changed the program."""
    node.keeper._ledger.own = PeerId("nobody")


def is_through(node: Node, peer: PeerId, epoch: int) -> bool:
    gone = peer not in node.host.connected_peers() | node.members()
    return gone and node.links._secrets.epoch == epoch


async def kick(swarm: TestSwarm, peer: PeerId, staying: list[Node], epoch: int) -> float:
    """Do as `pals peers kick`; return seconds until all who stay are through with it."""
    removal = await remove_peer(swarm.operator, peer, now=time.time())
    assert removal.is_rotated
    begun = trio.current_time()
    is_running = any(node.options.profile == swarm.operator for node in staying)
    with swarm.operator.lock() if is_running else nullcontext():  # as a server holds it
        told = await announce_change(swarm.operator, removal.entry, options_of(swarm).settings)
    await until(lambda: all(is_through(n, peer, epoch) for n in staying), deadline_s=10.0)
    assert told.is_running == is_running
    return trio.current_time() - begun


def options_of(swarm: TestSwarm, profile: Profile | None = None) -> NodeOptions:
    return swarm.options(profile or swarm.operator, poll_interval_s=NEVER_S)


@pytest.mark.slow
async def test_a_kick_cuts_a_running_answer_and_the_others_go_on(
    tmp_path: Path, nursery: trio.Nursery
) -> None:
    """Two trials: the first kicked peer serves the answer's middle, the second another copy."""
    parts = ("0:2", "2:6", "2:6", "2:6")
    async with make_swarm(tmp_path, count=4) as swarm:
        shards = [
            await start_shard(nursery, swarm, options_of(swarm, peer), part)
            for peer, part in zip(swarm.peers, parts, strict=True)
        ]
        async with open_client(swarm, poll_interval_s=NEVER_S) as client:
            for trial in (1, 2):
                answer = await ask(client, request([5, 9, 200, 31], count=80))
                await answer.next_token()
                used = client._opener.find(next(iter(client._opener._attempts)))
                assert used is not None
                victim = next(s for s in shards if s.node.peer_id == used.chain.tail.peer)
                shards.remove(victim)
                live_on(victim.node)
                staying = [client._node, *(shard.node for shard in shards)]
                took_s = await kick(swarm, victim.node.peer_id, staying, trial)
                assert took_s <= KICK_S
                tokens = await answer.all_tokens()  # another copy goes on with it
                assert len(tokens) == 80
                for node in staying:
                    with pytest.raises(PeerUnreachable):
                        await victim.node.host.connect(node.peer_id, node.host.addresses())
                    assert victim.node.peer_id not in node.discovery.known()
                assert victim.node.links._secrets.epoch == trial - 1
        nursery.cancel_scope.cancel()


async def test_a_command_without_a_running_node_tells_everybody_it_reaches(
    tmp_path: Path,
) -> None:
    async with make_swarm(tmp_path, count=2) as swarm:
        first, second = (options_of(swarm, peer) for peer in swarm.peers)
        async with open_node(first) as node, open_node(second) as ex:
            live_on(ex)
            took_s = await kick(swarm, ex.peer_id, [node], 1)
            assert took_s <= 20.0
            saved = first.profile.load_swarm()
            assert saved.epoch == 1
            assert saved.swarm_secret == swarm.operator.load_swarm().swarm_secret
            with pytest.raises(PalsError):
                await ex.host.open_stream(node.peer_id, SECRET_PROTOCOL)
            assert ex.options.profile.load_swarm().epoch == 0


async def test_a_late_comer_fetches_the_secret_before_its_first_link(tmp_path: Path) -> None:
    async with make_swarm(tmp_path, count=2) as swarm:
        first, late = (options_of(swarm, peer) for peer in swarm.peers)
        await rotate(swarm.operator, now=time.time())
        entry = await rotate(swarm.operator, now=time.time())
        async with (
            open_node(options_of(swarm)) as operator,
            open_node(first) as node,
            open_node(late) as back,
        ):
            for member in (node, back):
                assert member.links._secrets.epoch == 2
            for other in (node, operator):
                await back.links.ensure(other.peer_id, other.host.addresses())
        assert late.profile.load_swarm().swarm_secret == entry.swarm_secret


async def test_links_of_two_epochs_meet_in_the_newer_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with make_swarm(tmp_path, count=1) as swarm:
        behind = options_of(swarm, swarm.peers[0])
        async with open_node(options_of(swarm)) as operator, open_node(behind) as node:
            monkeypatch.setattr(Ledger, "heard", lambda *_: (False, []))  # nobody hears of it
            await rotate(swarm.operator, now=time.time())
            await until(lambda: operator.links._secrets.epoch == 1)
            assert node.links._secrets.epoch == 0
            monkeypatch.undo()
            await node.links.ensure(operator.peer_id, operator.host.addresses())
            assert node.links._secrets.epoch == 1
