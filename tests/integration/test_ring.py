"""The ring end to end: three shards and a driver over real libp2p in one process."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import trio

from pals.driver.sessions import open_sessions
from pals.engine.local import LocalChain
from pals.errors import ContextTooLong, NoChain, PeerUnreachable, SessionRefused
from pals.models.snapshot import Snapshot
from pals.net.removal import remove_peer
from pals.types import PeerId
from tests.integration.net.harness import until
from tests.integration.swarm import (
    LIMITS,
    TestSwarm,
    ask,
    make_swarm,
    open_client,
    request,
    served_model,
    start_chain,
    start_shard,
)
from tests.unit.engine.chains import generate, load_chain

pytestmark = [pytest.mark.trio, pytest.mark.timeout(180)]

PROMPTS = [[5, 9, 200, 31], list(range(40, 77)), [7] * 20]


def tokens_of_whole_model(swarm: TestSwarm, prompt: list[int], count: int = 12) -> list[int]:
    snapshot = Snapshot.open(swarm.checkpoint, "whole")
    return generate(load_chain(snapshot, [0], limits=LIMITS), prompt, count=count, chunk=16)


async def test_three_shards_give_the_tokens_of_the_whole_model(
    tmp_path: Path, nursery: trio.Nursery
) -> None:
    async with make_swarm(tmp_path) as swarm:
        await start_chain(nursery, swarm, "0:2", "2:5", "5:6")
        async with open_client(swarm) as client:
            one_by_one = [await (await ask(client, request(p))).all_tokens() for p in PROMPTS]

            first, second = (
                await ask(client, request(PROMPTS[0])),
                await ask(client, request(PROMPTS[1])),
            )
            together = [await first.all_tokens(), await second.all_tokens()]
        nursery.cancel_scope.cancel()

    expected = [tokens_of_whole_model(swarm, prompt) for prompt in PROMPTS]
    assert one_by_one == expected
    assert together == expected[:2]


async def test_sampled_text_depends_on_the_seed_and_not_on_the_split(
    tmp_path: Path, nursery: trio.Nursery
) -> None:
    drawn = {"temperature": 1.5, "top_p": 0.95}
    async with make_swarm(tmp_path) as swarm:
        shards = await start_chain(nursery, swarm, "0:2", "2:5", "5:6")
        async with open_client(swarm) as client:
            asked = [request(PROMPTS[0], seed=seed, **drawn) for seed in (1, 1, 2)]
            three = [await (await ask(client, r)).all_tokens() for r in asked]
        for shard in shards:
            shard.scope.cancel()
            await shard.finished.wait()
        await start_chain(nursery, swarm, "0:6")
        async with open_client(swarm) as client:
            one = await (await ask(client, asked[0])).all_tokens()
        nursery.cancel_scope.cancel()

    assert three[0] == three[1] == one
    assert three[0] != three[2]


async def test_an_embedding_is_that_of_the_whole_model(
    tmp_path: Path, nursery: trio.Nursery
) -> None:
    async with make_swarm(tmp_path) as swarm:
        await start_chain(nursery, swarm, "0:2", "2:5", "5:6")
        async with open_client(swarm) as client:
            again = [await client.embed(tuple(PROMPTS[1])) for _ in range(2)]
            short = await client.embed((5,))
        nursery.cancel_scope.cancel()

    snapshot = Snapshot.open(swarm.checkpoint, "whole")
    whole = LocalChain(load_chain(snapshot, [0], limits=LIMITS))
    for found, prompt in [(again[0], PROMPTS[1]), (again[1], PROMPTS[1]), (short, [5])]:
        np.testing.assert_allclose(found, whole.embed(prompt), atol=1e-4)


async def test_a_chain_with_a_hole_is_refused_by_the_names_of_its_layers(
    tmp_path: Path, nursery: trio.Nursery
) -> None:
    async with make_swarm(tmp_path) as swarm:
        await start_chain(nursery, swarm, "0:2", "4:5")
        async with open_client(swarm) as client:
            with pytest.raises(NoChain) as caught:
                await ask(client, request(PROMPTS[0]))
        nursery.cancel_scope.cancel()

    assert caught.value.fields["missing"] == "2:4,5:6"
    assert "--layers 2:4" in caught.value.hint


async def test_a_request_beyond_the_context_is_refused_before_any_work(
    tmp_path: Path, nursery: trio.Nursery
) -> None:
    async with make_swarm(tmp_path) as swarm:
        (shard,) = await start_chain(nursery, swarm, "0:6")
        async with open_client(swarm) as client:
            with pytest.raises(ContextTooLong) as caught:
                await ask(client, request([1] * 90, count=20))
            used = LIMITS.max_context_tokens
            fits = await (await ask(client, request([1] * 90, count=used - 90))).all_tokens()
        nursery.cancel_scope.cancel()

    assert (caught.value.fields["total"], caught.value.fields["limit"]) == (110, used)
    assert len(fits) == used - 90
    assert shard.node.peer_id


async def test_a_shard_that_goes_away_ends_the_answer_with_its_layers(
    tmp_path: Path, nursery: trio.Nursery
) -> None:
    async with make_swarm(tmp_path) as swarm:
        shards = await start_chain(nursery, swarm, "0:2", "2:5", "5:6")
        async with open_client(swarm) as client:
            answer = await ask(client, request(PROMPTS[0], count=80))
            await answer.next_token()
            shards[1].scope.cancel()
            with pytest.raises(NoChain) as caught:
                await answer.all_tokens()

            with pytest.raises(NoChain) as after:
                await ask(client, request(PROMPTS[0]))
        nursery.cancel_scope.cancel()

    assert caught.value.fields["missing"] == "2:5"
    assert after.value.fields["missing"] == "2:5"


async def test_another_shard_of_the_same_layers_goes_on_with_the_same_tokens(
    tmp_path: Path, nursery: trio.Nursery
) -> None:
    drawn = {"temperature": 1.5, "top_p": 0.95, "seed": 3}
    async with make_swarm(tmp_path, count=4) as swarm:
        shards = await start_chain(nursery, swarm, "0:2", "2:5", "5:6", "2:5")
        async with open_client(swarm, wait_for_peers_s=30.0) as client:
            whole = await (await ask(client, request(PROMPTS[0], count=80, **drawn))).all_tokens()
            answer = await ask(client, request(PROMPTS[0], count=80, **drawn))
            await answer.next_token()
            middle = answer.session.chain.hops[1].peer
            (lost,) = [shard for shard in shards if shard.node.peer_id == middle]
            lost.scope.cancel()
            moved = await answer.all_tokens()
            assert answer.session.chain.hops[1].peer != middle
        nursery.cancel_scope.cancel()

    assert moved == whole


async def test_closed_sessions_give_their_room_back(tmp_path: Path, nursery: trio.Nursery) -> None:
    async with make_swarm(tmp_path) as swarm:
        await start_chain(nursery, swarm, "0:3", "3:6")
        async with open_client(swarm) as client:
            for _ in range(3 * LIMITS.max_sessions):
                answer = await ask(client, request(PROMPTS[1], count=40))
                await answer.next_token()
                client.close(answer.session)  # in the middle, as when a reader goes away
            tokens = await (await ask(client, request(PROMPTS[0]))).all_tokens()
        nursery.cancel_scope.cancel()

    assert tokens == tokens_of_whole_model(swarm, PROMPTS[0])


async def test_more_sessions_than_a_shard_runs_wait_for_their_room(
    tmp_path: Path, nursery: trio.Nursery
) -> None:
    async with make_swarm(tmp_path) as swarm:
        await start_chain(nursery, swarm, "0:3", "3:6")
        async with open_client(swarm) as client:
            answers = [await ask(client, request(prompt, count=30)) for prompt in PROMPTS]
            assert len(answers) > LIMITS.max_sessions
            tokens = [await answer.all_tokens() for answer in answers]
        nursery.cancel_scope.cancel()

    assert tokens == [tokens_of_whole_model(swarm, prompt, 30) for prompt in PROMPTS]


async def test_a_prompt_that_comes_again_is_found_on_every_shard(
    tmp_path: Path, nursery: trio.Nursery
) -> None:
    prompt = list(range(1, 71))
    async with make_swarm(tmp_path) as swarm:
        await start_chain(nursery, swarm, "0:2", "2:5", "5:6")
        async with open_client(swarm) as client:
            first = await ask(client, request(prompt))
            tokens = [await first.all_tokens()]
            second = await ask(client, request(prompt))
            tokens.append(await second.all_tokens())
        nursery.cancel_scope.cancel()

    assert (first.session.attempt.start, second.session.attempt.start) == (0, 64)
    assert tokens == [tokens_of_whole_model(swarm, prompt)] * 2


async def test_the_chain_is_found_from_the_dht_alone(tmp_path: Path, nursery: trio.Nursery) -> None:
    async with make_swarm(tmp_path, count=4, hints=False) as swarm:
        idle = swarm.options(swarm.peers[3])
        async with open_sessions(idle, served_model(swarm)) as nobody:
            meeting_point = nobody.addresses[:1]
            await start_chain(nursery, swarm, "0:2", "2:5", "5:6", peers=meeting_point)
            async with open_client(swarm, peers=meeting_point) as client:
                tokens = await (await ask(client, request(PROMPTS[0]))).all_tokens()
        nursery.cancel_scope.cancel()

    assert tokens == tokens_of_whole_model(swarm, PROMPTS[0])


async def test_one_node_drives_and_serves_layers_of_the_same_chain(
    tmp_path: Path, nursery: trio.Nursery
) -> None:
    async with make_swarm(tmp_path) as swarm:
        await start_chain(nursery, swarm, "2:5", "5:6")
        async with open_client(swarm, layers="0:2") as head:
            as_head = await (await ask(head, request(PROMPTS[0]))).all_tokens()
        async with open_client(swarm, layers="0:6") as alone:
            as_whole = await (await ask(alone, request(PROMPTS[0]))).all_tokens()
        nursery.cancel_scope.cancel()

    assert as_head == as_whole == tokens_of_whole_model(swarm, PROMPTS[0])


async def test_a_removed_member_is_cut_off_within_one_poll(
    tmp_path: Path, nursery: trio.Nursery
) -> None:
    async with make_swarm(tmp_path) as swarm:
        soon_s, never_s = 0.2, 1e6
        parts = (("0:2", soon_s), ("2:5", never_s), ("5:6", soon_s))
        shards = [  # the removed one carries on, as if its owner had changed the program
            await start_shard(nursery, swarm, swarm.options(peer, poll_interval_s=poll_s), layers)
            for peer, (layers, poll_s) in zip(swarm.peers, parts, strict=True)
        ]
        removed = shards[1].node
        removed.keeper._ledger.own = PeerId("nobody")  # does not see that it is meant
        async with open_client(swarm, poll_interval_s=soon_s) as client:
            answer = await ask(client, request(PROMPTS[0], count=80))
            await answer.next_token()
            await remove_peer(swarm.operator, removed.peer_id, now=1e9)
            # whose list is newer, the driver's or a shard's, decides who says so
            with pytest.raises((NoChain, SessionRefused)):
                await answer.all_tokens()
            for shard in (shards[0], shards[2]):
                await until(lambda s=shard: removed.peer_id not in s.node.host.connected_peers())
                # what it has not seen closed yet would count as a connection
                peer = shard.node.peer_id
                await until(lambda p=peer: p not in removed.host.connected_peers())
            for shard in (shards[0], shards[2]):
                with pytest.raises(PeerUnreachable):
                    await removed.host.connect(shard.node.peer_id, shard.node.host.addresses())
            await until(lambda: removed.peer_id not in client._node.members())
            with pytest.raises(NoChain):
                await ask(client, request(PROMPTS[0]))
        nursery.cancel_scope.cancel()
